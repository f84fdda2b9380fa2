//! From what was seen to what is true.

use sovereign_kernel::Requirement;
use sovereign_protocol::condition::Verdict;

use crate::facts::{BootFacts, DataFact};

/// Less free space than this is too little for a database.
const LEAST_FREE_BYTES: u64 = 16 << 20;

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSeen {
    /// It is ext4.
    pub ext4: bool,
    /// The kernel made it read-only, as it does after an error.
    pub read_only: bool,
    /// Free for everybody, in bytes.
    pub free_bytes: u64,
    /// Size, in bytes.
    pub bytes: u64,
    /// Free inodes.
    pub free_inodes: u64,
}

/// Something that the running kernel does not show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    /// Such as `SYSVIPC`.
    pub symbol: String,
    /// What was tried and what came of it.
    pub seen: String,
    /// What does not work without it.
    pub breaks: Vec<String>,
}

impl Miss {
    /// A requirement of the kernel contract that is not met.
    #[must_use]
    pub fn of(requirement: &Requirement, seen: String) -> Self {
        Self {
            symbol: requirement.symbol.to_owned(),
            seen: format!("{seen}, needed to {}", requirement.why),
            breaks: requirement.breaks.iter().map(|name| (*name).to_owned()).collect(),
        }
    }
}

/// Judges the data disk from what init did and what is mounted now.
#[must_use]
pub fn disk(fact: Option<&DataFact>, seen: Result<&DiskSeen, &str>) -> Verdict {
    let Some(fact) = fact else {
        return Verdict::unknown("NoFacts", "init left no facts about the data disk");
    };
    if !fact.mounted {
        return Verdict::no(fact.reason.as_str(), &fact.evidence);
    }
    let seen = match seen {
        Ok(seen) => seen,
        Err(error) => return Verdict::unknown("Unreadable", error),
    };
    let space = format!("{} of {} MiB free", seen.free_bytes >> 20, seen.bytes >> 20);
    if !seen.ext4 {
        Verdict::no(
            "NotMounted",
            "the mount point of the data disk holds another file system",
        )
    } else if seen.read_only {
        Verdict::no(
            "ReadOnly",
            format!("the kernel made it read-only, as it does after an error; {space}"),
        )
    } else if seen.free_bytes < LEAST_FREE_BYTES || seen.free_inodes == 0 {
        Verdict::no("Full", format!("{space}, {} inodes", seen.free_inodes))
    } else {
        // No exact space here: evidence that changes with each look would be news each time.
        Verdict::yes("Mounted", &fact.evidence)
    }
}

/// Judges the kernel against what is to run.
#[must_use]
pub fn kernel(misses: &[Miss], wanted: &[&str], facts: &BootFacts) -> Verdict {
    let hurts = |miss: &&Miss| miss.breaks.iter().any(|name| wanted.contains(&name.as_str()));
    let text = |miss: &Miss| {
        format!(
            "{} ({}) breaks {}",
            miss.symbol,
            miss.seen,
            miss.breaks.join(", ")
        )
    };
    let bad: Vec<String> = misses.iter().filter(hurts).map(text).collect();
    if !bad.is_empty() {
        return Verdict::no("Lacks", bad.join("; "));
    }
    let spare: Vec<&str> = misses.iter().map(|miss| miss.symbol.as_str()).collect();
    let mut evidence = if spare.is_empty() {
        "every requirement shows".to_owned()
    } else {
        format!("not there and not needed now: {}", spare.join(", "))
    };
    if let Some(failures) = facts.failures() {
        evidence = format!("{evidence}; failed at boot: {failures}");
    }
    Verdict::yes("Met", evidence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::condition::Status;

    fn mounted() -> DataFact {
        DataFact {
            mounted: true,
            reason: "Mounted".into(),
            evidence: "/dev/vdc".into(),
        }
    }

    fn seen() -> DiskSeen {
        DiskSeen {
            ext4: true,
            read_only: false,
            free_bytes: 1 << 30,
            bytes: 2 << 30,
            free_inodes: 5,
        }
    }

    #[test]
    fn a_disk_is_good_only_when_mounted_writable_and_not_full() {
        let cases: [(DiskSeen, &str); 5] = [
            (seen(), "Mounted"),
            (
                DiskSeen {
                    ext4: false,
                    ..seen()
                },
                "NotMounted",
            ),
            (
                DiskSeen {
                    read_only: true,
                    ..seen()
                },
                "ReadOnly",
            ),
            (
                DiskSeen {
                    free_bytes: 1 << 20,
                    ..seen()
                },
                "Full",
            ),
            (
                DiskSeen {
                    free_inodes: 0,
                    ..seen()
                },
                "Full",
            ),
        ];
        for (seen, reason) in cases {
            let verdict = disk(Some(&mounted()), Ok(&seen));
            assert_eq!(verdict.reason, reason);
            assert_eq!(verdict.status == Status::True, reason == "Mounted");
        }
        let refused = DataFact {
            mounted: false,
            reason: "Foreign".into(),
            evidence: "xfs".into(),
        };
        assert_eq!(disk(Some(&refused), Ok(&seen())), Verdict::no("Foreign", "xfs"));
        assert_eq!(disk(None, Ok(&seen())).status, Status::Unknown);
        assert_eq!(disk(Some(&mounted()), Err("EIO")).status, Status::Unknown);
    }

    #[test]
    fn a_disk_with_exactly_the_least_is_not_full() {
        let with = |free_bytes| {
            let seen = DiskSeen { free_bytes, ..seen() };
            disk(Some(&mounted()), Ok(&seen)).reason
        };
        assert_eq!(with(LEAST_FREE_BYTES), "Mounted");
        assert_eq!(with(LEAST_FREE_BYTES - 1), "Full");
    }

    #[test]
    fn a_miss_counts_when_something_wanted_needs_it() {
        let miss = Miss {
            symbol: "TUN".into(),
            seen: "/dev/net/tun: ENODEV".into(),
            breaks: vec!["tailscale".into()],
        };
        let facts = BootFacts::default();
        let verdict = kernel(std::slice::from_ref(&miss), &["agent", "postgresql"], &facts);
        assert_eq!(
            (verdict.status, verdict.evidence.as_str()),
            (Status::True, "not there and not needed now: TUN")
        );
        let verdict = kernel(&[miss], &["tailscale"], &facts);
        assert_eq!(
            (verdict.status, verdict.evidence.as_str()),
            (Status::False, "TUN (/dev/net/tun: ENODEV) breaks tailscale")
        );
    }
}
