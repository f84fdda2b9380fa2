//! One rule as its arguments, and how they are written.

use std::fmt;

use serde::Serialize;

/// The arguments of a rule after `-A CHAIN`, unquoted, in the order in which the programs print them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule(Vec<String>);

impl Rule {
    /// A rule of words that need no quotes.
    pub(super) fn of(words: &str) -> Self {
        Self(words.split_ascii_whitespace().map(str::to_owned).collect())
    }

    /// Reads the arguments; `None` when they could not be written again in one line.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.chars().any(char::is_control) {
            return None;
        }
        let (mut words, mut word) = (Vec::new(), None::<String>);
        let (mut quoted, mut chars) = (false, text.chars());
        while let Some(c) = chars.next() {
            match c {
                '"' => {
                    quoted = !quoted;
                    word.get_or_insert_default();
                }
                '\\' if quoted => word.get_or_insert_default().extend(chars.next()),
                ' ' if !quoted => words.extend(word.take()),
                c => word.get_or_insert_default().push(c),
            }
        }
        words.extend(word);
        (!quoted).then_some(Self(words))
    }

    /// A rule that no wanted one is equal to, for what cannot be read.
    pub(crate) fn unreadable() -> Self {
        Self(Vec::new())
    }

    /// The arguments.
    #[must_use]
    pub fn words(&self) -> &[String] {
        &self.0
    }

    /// What follows an option.
    pub(crate) fn value(&self, option: &str) -> Option<&str> {
        let at = self.0.iter().position(|word| word == option)?;
        self.0.get(at + 1).map(String::as_str)
    }

    /// The chain that it leads to, or its target.
    pub(crate) fn target(&self) -> Option<&str> {
        self.value("-j").or_else(|| self.value("-g"))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, word) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str(" ")?;
            }
            if !word.is_empty() && !word.contains([' ', '"', '\'', '\\']) {
                f.write_str(word)?;
                continue;
            }
            f.write_str("\"")?;
            for c in word.chars() {
                if matches!(c, '"' | '\'' | '\\') {
                    f.write_str("\\")?;
                }
                write!(f, "{c}")?;
            }
            f.write_str("\"")?;
        }
        Ok(())
    }
}

impl Serialize for Rule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_written_as_they_are_read() {
        let plain = "-s 10.0.0.0/8 ! -o br0 -m comment --comment sv5pkj -j MASQUERADE";
        // As iptables-save 1.8.9 printed it for: a'b "q" \ x
        let quoted = r#"-m comment --comment "a\'b \"q\" \\ x" -j DROP"#;
        for text in [plain, quoted, r#"-m comment --comment "" -j DROP"#] {
            assert_eq!(Rule::parse(text).unwrap().to_string(), text);
        }
        let rule = Rule::parse(quoted).unwrap();
        assert_eq!(rule.value("--comment"), Some(r#"a'b "q" \ x"#));
        assert_eq!((rule.target(), rule.words().len()), (Some("DROP"), 6));
        assert_eq!(rule.value("DROP"), None);
        assert_eq!(Rule::of(plain), Rule::parse(plain).unwrap());
    }

    #[test]
    fn what_one_line_cannot_hold_is_no_rule() {
        for bad in [
            "-m comment --comment \"a\nb\" -j DROP",
            "-j \"DROP",
            "\t",
            "-j \"DROP\\",
        ] {
            assert_eq!(Rule::parse(bad), None, "{bad:?}");
        }
    }
}
