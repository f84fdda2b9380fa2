//! Findings: what is broken, how that is known, how to find out that it is not so, and what to do.

use serde::{Deserialize, Serialize};

use crate::layers::Level;
use crate::name::Name;

/// One thing that is broken and that nothing else explains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Where it is broken.
    pub layer: Level,
    /// Whose it is; `None` for what belongs to the whole instance.
    pub guest: Option<Name>,
    /// What of the layer, such as a service's name.
    pub subject: String,
    /// The code of the reason, in CamelCase, as in the condition.
    pub code: String,
    /// What is wrong, in one sentence.
    pub what: String,
    /// What was seen, most telling first; never empty.
    pub evidence: Vec<Evidence>,
    /// How to find out that this diagnosis is wrong.
    pub counter_test: CounterTest,
    /// The next command to run.
    pub fix: String,
    /// True when the fix may be applied without asking: it loses nothing and may be run twice.
    pub automatic: bool,
    /// What the fix may cost.
    pub risk: String,
    /// The leftover of a script that `doctor --fix=NAME` removes, where it is one.
    #[serde(default)]
    pub leftover: Option<String>,
}

/// Something that was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Who saw it, such as `host agent`, `guest agent`, `shim` or `console`.
    pub source: String,
    /// Milliseconds since it was seen.
    pub age_ms: u64,
    /// What was seen, on one line.
    pub text: String,
}

/// A check whose outcome would contradict the diagnosis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterTest {
    /// The command; it changes nothing.
    pub run: String,
    /// What it shows if the diagnosis is wrong.
    pub wrong_if: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::Layer;

    #[test]
    fn a_finding_reads_back_as_it_was_written() {
        let finding = Finding {
            layer: Layer::Service.into(),
            guest: Some(Name::parse("sql").unwrap()),
            subject: "postgres".into(),
            code: "Silent".into(),
            what: "it is silent".into(),
            evidence: vec![Evidence {
                source: "guest agent".into(),
                age_ms: 7,
                text: "no answer".into(),
            }],
            counter_test: CounterTest {
                run: "sovereign psql sql -c 'select 1'".into(),
                wrong_if: "it prints 1".into(),
            },
            fix: "sovereign logs sql".into(),
            automatic: true,
            risk: "none".into(),
            leftover: None,
        };
        let text = serde_json::to_string(&finding).unwrap();
        assert!(
            text.starts_with(
                r#"{"layer":"service","guest":"sql","subject":"postgres","code":"Silent","what":"#
            ),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Finding>(&text).unwrap(), finding);
    }
}
