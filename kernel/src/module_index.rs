//! The binary index that modprobe searches: a trie over 7-bit text, big-endian.
//!
//! Format: kmod `libkmod/libkmod-index.c`. The nodes are those that depmod writes for the same entries, the root
//! without a prefix like there; parents come before children, as in depmod since kmod 34 at the latest (30 writes
//! them the other way round; readers follow offsets).

use std::{collections::BTreeMap, ops::Range};

const MAGIC: u32 = 0xB007_F457;
const VERSION: u32 = 0x0002_0001;
const NODE_PREFIX: u32 = 0x8000_0000;
const NODE_VALUES: u32 = 0x4000_0000;
const NODE_CHILDREN: u32 = 0x2000_0000;
const OFFSET_MAX: usize = 0x0fff_ffff;
const HEADER_BYTES: usize = 12;
/// Longest key in bytes; each byte of a key is at most one level of the trie.
const KEY_MAX: usize = 1024;

/// Keys to values, several for one key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleIndex {
    entries: BTreeMap<Vec<u8>, Vec<Value>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Value {
    priority: u32,
    text: String,
}

impl ModuleIndex {
    /// Adds a value; modprobe tries those of a key by rising priority. What the format cannot hold (other than 7-bit
    /// text without NUL, longer than 1,024 bytes) is left out, because nothing could look it up.
    pub fn insert(&mut self, key: &str, text: &str, priority: usize) {
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii() && byte != 0);
        let Ok(priority) = u32::try_from(priority) else {
            return;
        };
        if key.len() > KEY_MAX || !plain(key) || !plain(text) {
            return;
        }
        let values = self.entries.entry(key.as_bytes().to_vec()).or_default();
        let at = values.partition_point(|value| value.priority < priority);
        let text = text.to_owned();
        values.insert(at, Value { priority, text });
    }

    /// The index as modprobe reads it; nothing when it grows past the 256 MiB that its offsets reach.
    #[must_use]
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let entries: Vec<Entry<'_>> = self
            .entries
            .iter()
            .map(|(key, values)| (key.as_slice(), values.as_slice()))
            .collect();
        let root = Node::of(&entries, 0..0);
        let mut output = Vec::with_capacity(HEADER_BYTES + root.total);
        for word in [MAGIC, VERSION, root.reference(HEADER_BYTES)?] {
            output.extend(word.to_be_bytes());
        }
        root.write(&mut output)?;
        Some(output)
    }
}

/// Dashes outside brackets become underscores in an alias key, as modprobe does with what it looks up; nothing for
/// brackets without their counterpart.
pub(crate) fn alias_key(alias: &str) -> Option<String> {
    let mut key = String::with_capacity(alias.len());
    let mut rest = alias;
    while let Some((before, after)) = rest.split_once('[') {
        let (inside, after) = after.split_once(']')?;
        key.push_str(&outside(before)?);
        key.push_str(&format!("[{inside}]"));
        rest = after;
    }
    key.push_str(&outside(rest)?);
    Some(key)
}

fn outside(text: &str) -> Option<String> {
    (!text.contains(']')).then(|| text.replace('-', "_"))
}

type Entry<'a> = (&'a [u8], &'a [Value]);

/// A node of the trie; its children follow it in the file.
struct Node<'a> {
    prefix: &'a [u8],
    values: &'a [Value],
    children: Vec<(u8, Node<'a>)>,
    /// Bytes of it alone.
    size: usize,
    /// Bytes of it and all below.
    total: usize,
}

impl<'a> Node<'a> {
    /// The node for `entries` (sorted, equal up to the end of `prefix`, the range of it in every key).
    fn of(entries: &[Entry<'a>], prefix: Range<usize>) -> Self {
        let end = prefix.end;
        let (own, below) = match entries.split_first() {
            Some(((key, values), below)) if key.len() == end => (*values, below),
            _ => (&[][..], entries),
        };
        let children: Vec<(u8, Self)> = below
            .chunk_by(|left, right| left.0[end] == right.0[end])
            .map(|group| (group[0].0[end], Self::of(group, end + 1..common(group))))
            .collect();
        let mut node = Self {
            prefix: entries.first().map_or(&[], |(key, _)| &key[prefix]),
            values: own,
            size: 0,
            total: 0,
            children,
        };
        node.size = node.own_size();
        node.total = node.size + node.children.iter().map(|(_, child)| child.total).sum::<usize>();
        node
    }

    fn own_size(&self) -> usize {
        let prefix = if self.prefix.is_empty() {
            0
        } else {
            self.prefix.len() + 1
        };
        let children = self
            .span()
            .map_or(0, |(first, last)| 2 + 4 * (usize::from(last - first) + 1));
        let values: usize = self.values.iter().map(|value| 4 + value.text.len() + 1).sum();
        prefix + children + if values == 0 { 0 } else { 4 + values }
    }

    fn span(&self) -> Option<(u8, u8)> {
        Some((self.children.first()?.0, self.children.last()?.0))
    }

    /// Its flagged offset, when it starts at `offset`.
    fn reference(&self, offset: usize) -> Option<u32> {
        let flag = |present: bool, flag: u32| if present { flag } else { 0 };
        let flags = flag(!self.prefix.is_empty(), NODE_PREFIX)
            | flag(!self.values.is_empty(), NODE_VALUES)
            | flag(!self.children.is_empty(), NODE_CHILDREN);
        let end = offset.checked_add(self.total)?;
        Some(u32::try_from(offset).ok().filter(|_| end <= OFFSET_MAX)? | flags)
    }

    fn write(&self, output: &mut Vec<u8>) -> Option<()> {
        let mut offset = output.len() + self.size;
        if !self.prefix.is_empty() {
            output.extend(self.prefix);
            output.push(0);
        }
        if let Some((first, last)) = self.span() {
            output.extend([first, last]);
            let mut children = self.children.iter().peekable();
            for byte in first..=last {
                let reference = match children.next_if(|(of, _)| *of == byte) {
                    None => 0,
                    Some((_, child)) => {
                        let reference = child.reference(offset)?;
                        offset += child.total;
                        reference
                    }
                };
                output.extend(reference.to_be_bytes());
            }
        }
        if !self.values.is_empty() {
            output.extend(u32::try_from(self.values.len()).ok()?.to_be_bytes());
            for value in self.values {
                output.extend(value.priority.to_be_bytes());
                output.extend(value.text.as_bytes());
                output.push(0);
            }
        }
        self.children
            .iter()
            .try_for_each(|(_, child)| child.write(output))
    }
}

/// How far the keys of a group agree.
fn common(group: &[Entry<'_>]) -> usize {
    let (Some((first, _)), Some((last, _))) = (group.first(), group.last()) else {
        return 0;
    };
    first
        .iter()
        .zip(last.iter())
        .take_while(|(left, right)| left == right)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader as simple as the writer: walks the trie for one exact key.
    fn lookup(bytes: &[u8], key: &[u8]) -> Option<Vec<String>> {
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        let text = |at: usize| bytes[at..].split(|byte| *byte == 0).next().unwrap();
        let (mut node, mut key) = (word(8), key);
        loop {
            let mut at = (node & 0x0fff_ffff) as usize;
            if node & NODE_PREFIX != 0 {
                let prefix = text(at);
                key = key.strip_prefix(prefix)?;
                at += prefix.len() + 1;
            }
            let mut table = None;
            if node & NODE_CHILDREN != 0 {
                table = Some((bytes[at], bytes[at + 1], at + 2));
                at += 2 + 4 * (usize::from(bytes[at + 1]) - usize::from(bytes[at]) + 1);
            }
            let Some((byte, rest)) = key.split_first() else {
                if node & NODE_VALUES == 0 {
                    return None;
                }
                let mut values = Vec::new();
                let count = word(at);
                at += 4;
                for _ in 0..count {
                    let value = String::from_utf8(text(at + 4).to_vec()).unwrap();
                    at += 4 + value.len() + 1;
                    values.push(value);
                }
                return Some(values);
            };
            let (first, last, start) = table?;
            if !(first..=last).contains(byte) {
                return None;
            }
            node = word(start + 4 * usize::from(byte - first));
            if node == 0 {
                return None;
            }
            key = rest;
        }
    }

    #[test]
    fn every_key_is_found_again() {
        let keys = [
            "nf_tables",
            "nf_nat",
            "nft_ct",
            "nft",
            "tun",
            "nf_tables_x",
            "",
            "n~",
        ];
        let mut index = ModuleIndex::default();
        for key in keys {
            index.insert(key, &format!("value of {key}"), 0);
        }
        let bytes = index.bytes().unwrap();
        for key in keys {
            assert_eq!(
                lookup(&bytes, key.as_bytes()),
                Some(vec![format!("value of {key}")]),
                "{key}"
            );
        }
        for key in ["n", "nf_", "zzz", "tunn", "nA"] {
            assert_eq!(lookup(&bytes, key.as_bytes()), None, "{key}");
        }
    }

    #[test]
    fn values_come_by_rising_priority() {
        let mut index = ModuleIndex::default();
        for (text, priority) in [("c", 7), ("a", 0), ("b", 3)] {
            index.insert("key", text, priority);
        }
        assert_eq!(lookup(&index.bytes().unwrap(), b"key").unwrap(), ["a", "b", "c"]);
    }

    #[test]
    fn what_the_format_cannot_hold_is_left_out() {
        let mut index = ModuleIndex::default();
        index.insert("ä", "x", 0);
        index.insert("a\0b", "x", 0);
        index.insert("a", "ä", 0);
        index.insert(&"x".repeat(KEY_MAX + 1), "x", 0);
        assert_eq!(index, ModuleIndex::default());
        assert_eq!(index.bytes().unwrap().len(), HEADER_BYTES);
    }

    #[test]
    fn the_deepest_trie_is_written() {
        let mut index = ModuleIndex::default();
        for length in 0..=KEY_MAX {
            index.insert(&"x".repeat(length), "v", 0);
        }
        let bytes = index.bytes().unwrap();
        assert!(lookup(&bytes, "x".repeat(KEY_MAX).as_bytes()).is_some());
    }

    #[test]
    fn alias_keys_keep_dashes_in_brackets() {
        assert_eq!(alias_key("nft-expr-ct").unwrap(), "nft_expr_ct");
        assert_eq!(alias_key("of-x[0-9]y-z[a-b]").unwrap(), "of_x[0-9]y_z[a-b]");
        for odd in ["a[0-9", "a]", "a[b]c]d"] {
            assert_eq!(alias_key(odd), None, "{odd}");
        }
    }
}
