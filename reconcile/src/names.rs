//! Names, marks and MAC addresses of our links: the same for the same instance, for ever.
//!
//! A link name holds 15 bytes, so an instance is a short digest in it and a long guest name
//! too. Two things that would share a name are found where the wanted state is made, never
//! merged; a link of ours is known by name prefix *and* device group.

use std::fmt;

use sha2::{Digest, Sha256};
pub use sovereign_protocol::link_name::{LINK_NAME_BYTES, LinkName};
use sovereign_protocol::name::Name;

use crate::observed::Link;

const PREFIX: &str = "sv";
const TAG_CHARS: usize = 4;
const GROUPS: u32 = 0x4000_0000;
const TABLES: u32 = 0x5300_0000;
const GUEST_CHARS: usize = 8;
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What our links carry, so that we find them again and touch no other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// How their names begin.
    pub prefix: String,
    /// Their device group; never 0, which is everybody's.
    pub group: u32,
    /// The routing table of the instance: far from those of Android (97 to 99, 1000 and 10^9 and a little more) and of
    /// everybody who counts from 1.
    pub table: u32,
}

impl Mark {
    /// The mark of an instance.
    #[must_use]
    pub fn of(instance: &Name) -> Self {
        let bytes = digest("link", &[instance.as_str()]);
        let number = u32::from_be_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        Self {
            prefix: format!("{PREFIX}{}", text(&bytes, TAG_CHARS)),
            group: GROUPS | (number >> 4), // a positive int for every tool
            table: TABLES | (number >> 8), // 1392508928 to 1409286143
        }
    }

    /// The mark that a link carries, of whatever instance; its table follows from its group.
    #[must_use]
    pub fn on(link: &Link) -> Option<Self> {
        let prefix = link
            .name
            .get(..PREFIX.len() + TAG_CHARS)
            .filter(|text| Self::is_prefix(text))?;
        let rest = &link.name[prefix.len()..];
        let named = rest.is_empty() || rest.starts_with(['-', '_']);
        (named && link.group & !0x0fff_ffff == GROUPS).then(|| Self {
            prefix: prefix.to_owned(),
            group: link.group,
            table: TABLES | (link.group & 0x0fff_ffff) >> 4,
        })
    }

    /// Whether an instance's links begin so.
    #[must_use]
    pub fn is_prefix(text: &str) -> bool {
        let tag = text.strip_prefix(PREFIX).unwrap_or_default();
        tag.len() == TAG_CHARS && tag.bytes().all(|letter| ALPHABET.contains(&letter))
    }

    /// Whether a table is some instance's.
    #[must_use]
    pub fn has_table(table: u32) -> bool {
        table & !0x00ff_ffff == TABLES
    }

    /// Whether a link with this name and group is ours.
    #[must_use]
    pub fn is_on(&self, name: &str, group: u32) -> bool {
        group == self.group && name.starts_with(&self.prefix)
    }
}

/// The bridge of an instance.
#[must_use]
pub fn bridge(instance: &Name) -> LinkName {
    own(&Mark::of(instance).prefix)
}

/// The TAP of a guest: `-` and the guest's name where it fits, else `_` and a digest.
#[must_use]
pub fn tap(instance: &Name, guest: &Name) -> LinkName {
    let prefix = Mark::of(instance).prefix;
    own(&if guest.as_str().len() <= GUEST_CHARS {
        format!("{prefix}-{guest}")
    } else {
        let bytes = digest("tap", &[guest.as_str()]);
        format!("{prefix}_{}", text(&bytes, GUEST_CHARS))
    })
}

/// The TAP of the program that leads out of a private namespace. No guest's is called so: those with `_` have eight letters
/// after it.
#[must_use]
pub fn way_out(instance: &Name) -> LinkName {
    own(&format!("{}_pasta", Mark::of(instance).prefix))
}

/// The bridge's own address, pinned: otherwise it takes that of its lowest port.
#[must_use]
pub fn bridge_mac(instance: &Name) -> Mac {
    mac(&digest("bridge mac", &[instance.as_str()]))
}

/// The address of a guest's network card.
#[must_use]
pub fn guest_mac(instance: &Name, guest: &Name) -> Mac {
    mac(&digest("guest mac", &[instance.as_str(), guest.as_str()]))
}

/// # Panics
/// Never: prefix, sign and eight characters are fifteen plain bytes.
fn own(text: &str) -> LinkName {
    LinkName::parse(text).expect("at most fifteen plain bytes")
}

/// Unicast, locally administered.
fn mac(bytes: &[u8; 32]) -> Mac {
    Mac([2, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]])
}

fn digest(what: &str, parts: &[&str]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in std::iter::once(&what).chain(parts) {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Five bits a letter, from the start.
fn text(bytes: &[u8; 32], letters: usize) -> String {
    let bit = |n: usize| usize::from(bytes[n / 8] >> (7 - n % 8) & 1);
    let letter = |n: usize| (5 * n..5 * n + 5).fold(0, |value, n| value << 1 | bit(n));
    (0..letters).map(|n| char::from(ALPHABET[letter(n)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    /// These names stand on running machines: a change here orphans their links.
    #[test]
    fn names_are_fixed_for_ever() {
        let instance = name("default");
        let mark = Mark::of(&instance);
        assert_eq!((mark.prefix.as_str(), mark.group), ("sv5pkj", 0x4e6e6403));
        assert_eq!(mark.table, 0x53e6_e640);
        assert_eq!(bridge(&instance).as_str(), "sv5pkj");
        assert_eq!(tap(&instance, &name("sql")).as_str(), "sv5pkj-sql");
        assert_eq!(tap(&instance, &name("vaultwarden")).as_str(), "sv5pkj_ic73gmib");
        assert_eq!(bridge_mac(&instance).to_string(), "02:87:bc:c5:a8:42");
        assert_eq!(
            guest_mac(&instance, &name("sql")).to_string(),
            "02:a5:1b:92:59:24"
        );
    }

    proptest! {
        #[test]
        fn names_fit_differ_and_carry_the_mark(
            instance in "[a-z][a-z0-9]{0,31}",
            guests in proptest::collection::btree_set("[a-z][a-z0-9]{0,31}", 1..64),
        ) {
            let instance = name(&instance);
            let mark = Mark::of(&instance);
            let mut seen = std::collections::BTreeSet::from([bridge(&instance)]);
            for guest in &guests {
                let tap = tap(&instance, &name(guest));
                prop_assert!(LinkName::parse(tap.as_str()).is_some());
                prop_assert!(mark.is_on(tap.as_str(), mark.group));
                prop_assert!(seen.insert(tap), "two links share a name");
            }
            for name in &seen {
                let mut link = crate::observed::Observed::fresh().links.remove(&1).unwrap();
                (link.name, link.group) = (name.to_string(), mark.group);
                prop_assert_eq!(Mark::on(&link), Some(mark.clone()), "all of it is known from any link");
            }
            prop_assert!(mark.group > 0 && mark.group <= i32::MAX as u32);
            prop_assert!(!mark.is_on("eth0", mark.group));
            prop_assert!(!mark.is_on(&mark.prefix, 0));
        }
    }
}
