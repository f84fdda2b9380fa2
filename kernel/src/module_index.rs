//! The index files that modprobe reads, written without depmod.
//!
//! Format: kmod `libkmod/libkmod-index.c` (a trie, big-endian, children before parents).

use std::collections::BTreeMap;

use crate::modules::{ReadyModule, canonical_name};

const MAGIC: u32 = 0xB007_F457;
const VERSION: u32 = 0x0002_0001;
const NODE_PREFIX: u32 = 0x8000_0000;
const NODE_VALUES: u32 = 0x4000_0000;
const NODE_CHILDREN: u32 = 0x2000_0000;
const HEADER_BYTES: usize = 12;

/// Keys to values, in the order in which modprobe should try them.
pub type ModuleIndex = BTreeMap<String, Vec<String>>;

/// The text of `modules.dep` for these modules: `path: direct and indirect dependencies`.
#[must_use]
pub fn dependency_text(modules: &[ReadyModule]) -> String {
    modules
        .iter()
        .map(|module| format!("{}\n", dependency_line(module, modules)))
        .collect()
}

/// Index contents for `modules.dep.bin` (first) and `modules.alias.bin` (second).
#[must_use]
pub fn indexes(modules: &[ReadyModule]) -> (ModuleIndex, ModuleIndex) {
    let dependencies = modules
        .iter()
        .map(|module| (module.name.clone(), vec![dependency_line(module, modules)]));
    let mut aliases = ModuleIndex::new();
    for module in modules {
        for alias in &module.aliases {
            aliases
                .entry(alias_key(alias))
                .or_default()
                .push(module.name.clone());
        }
    }
    (dependencies.collect(), aliases)
}

/// Encodes an index in modprobe's binary form.
#[must_use]
pub fn index_bytes(index: &ModuleIndex) -> Vec<u8> {
    let entries: Vec<(&[u8], &[String])> = index
        .iter()
        .map(|(key, values)| (key.as_bytes(), values.as_slice()))
        .collect();
    let mut output = vec![0; HEADER_BYTES];
    let root = write_node(&entries, &mut output);
    for (at, word) in [MAGIC, VERSION, root].into_iter().enumerate() {
        output[at * 4..at * 4 + 4].copy_from_slice(&word.to_be_bytes());
    }
    output
}

/// Dashes outside brackets become underscores in an alias key, as modprobe does with what it looks up.
fn alias_key(alias: &str) -> String {
    match alias.split_once('[') {
        None => canonical_name(alias),
        Some((before, rest)) => match rest.split_once(']') {
            Some((inside, after)) => format!("{}[{inside}]{}", canonical_name(before), alias_key(after)),
            None => alias.to_owned(),
        },
    }
}

fn dependency_line(module: &ReadyModule, modules: &[ReadyModule]) -> String {
    // modprobe loads the list from its end, so what is needed first comes last.
    let mut needed: Vec<&str> = vec![&module.name];
    let mut at = 0;
    while let Some(name) = needed.get(at).copied() {
        let depends = modules
            .iter()
            .find(|other| other.name == name)
            .map_or(&[][..], |other| &other.depends);
        needed.extend(
            depends
                .iter()
                .map(String::as_str)
                .filter(|name| !needed.contains(name))
                .collect::<Vec<_>>(),
        );
        at += 1;
    }
    // `modules` is in load order: the reverse of it is a valid order for the list.
    let paths = modules
        .iter()
        .rev()
        .filter(|other| other.name != module.name && needed.contains(&other.name.as_str()));
    paths.fold(format!("{}:", module.path), |line, other| {
        format!("{line} {}", other.path)
    })
}

/// Writes the node for `entries` (sorted by key, relative to this node); returns its flagged offset.
fn write_node(entries: &[(&[u8], &[String])], output: &mut Vec<u8>) -> u32 {
    let prefix = common_prefix(entries);
    let rest: Vec<(&[u8], &[String])> = entries
        .iter()
        .map(|(key, values)| (&key[prefix.len()..], *values))
        .collect();
    let values: &[String] = rest
        .first()
        .filter(|(key, _)| key.is_empty())
        .map_or(&[], |(_, values)| values);
    let below = &rest[usize::from(rest.first().is_some_and(|(key, _)| key.is_empty()))..];
    let mut children = BTreeMap::new();
    for group in below.chunk_by(|left, right| left.0[0] == right.0[0]) {
        let tail: Vec<(&[u8], &[String])> = group.iter().map(|(key, values)| (&key[1..], *values)).collect();
        children.insert(group[0].0[0], write_node(&tail, output));
    }
    let mut offset = u32::try_from(output.len()).unwrap_or(u32::MAX) & 0x0fff_ffff;
    if !prefix.is_empty() {
        offset |= NODE_PREFIX;
        output.extend(prefix);
        output.push(0);
    }
    if let (Some(first), Some(last)) = (children.keys().next(), children.keys().next_back()) {
        offset |= NODE_CHILDREN;
        output.extend([*first, *last]);
        for byte in *first..=*last {
            output.extend(children.get(&byte).copied().unwrap_or(0).to_be_bytes());
        }
    }
    if !values.is_empty() {
        offset |= NODE_VALUES;
        output.extend(u32::try_from(values.len()).unwrap_or(0).to_be_bytes());
        for (priority, value) in (0_u32..).zip(values) {
            output.extend(priority.to_be_bytes());
            output.extend(value.as_bytes());
            output.push(0);
        }
    }
    offset
}

fn common_prefix<'a>(entries: &[(&'a [u8], &[String])]) -> &'a [u8] {
    let (Some((first, _)), Some((last, _))) = (entries.first(), entries.last()) else {
        return &[];
    };
    let length = first
        .iter()
        .zip(last.iter())
        .take_while(|(left, right)| left == right)
        .count();
    &first[..length]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, depends: &[&str]) -> ReadyModule {
        ReadyModule {
            name: name.to_owned(),
            path: format!("kernel/{name}.ko"),
            bytes: Vec::new(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
            aliases: vec![],
        }
    }

    #[test]
    fn dependencies_are_listed_last_needed_first() {
        let modules = [module("c", &[]), module("b", &["c"]), module("a", &["b", "c"])];
        let text = dependency_text(&modules);
        assert_eq!(
            text,
            "kernel/c.ko:\nkernel/b.ko: kernel/c.ko\nkernel/a.ko: kernel/b.ko kernel/c.ko\n"
        );
    }

    /// A reader as simple as the writer: walks the trie for one exact key.
    fn lookup(bytes: &[u8], key: &[u8]) -> Option<String> {
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
                return (node & NODE_VALUES != 0).then(|| String::from_utf8(text(at + 8).to_vec()).unwrap());
            };
            let (first, last, start) = table?;
            if !(first..=last).contains(byte) {
                return None;
            }
            node = word(start + 4 * usize::from(byte - first));
            key = rest;
        }
    }

    #[test]
    fn every_key_is_found_again() {
        let keys = ["nf_tables", "nf_nat", "nft_ct", "nft", "tun", "nf_tables_x"];
        let index: ModuleIndex = keys
            .iter()
            .map(|key| ((*key).to_owned(), vec![format!("value of {key}")]))
            .collect();
        let bytes = index_bytes(&index);
        for key in keys {
            assert_eq!(lookup(&bytes, key.as_bytes()), Some(format!("value of {key}")));
        }
        for key in ["n", "nf_", "zzz", "tunn", ""] {
            assert_eq!(lookup(&bytes, key.as_bytes()), None, "{key}");
        }
    }

    #[test]
    fn alias_keys_keep_dashes_in_brackets() {
        assert_eq!(alias_key("nft-expr-ct"), "nft_expr_ct");
        assert_eq!(alias_key("of-x[0-9]y-z"), "of_x[0-9]y_z");
    }
}
