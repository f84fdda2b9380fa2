//! Conditions: what is true now, as far as it was observed.

use serde::{Deserialize, Serialize};

use crate::limits::{EVIDENCE_CHARS, REASON_CHARS, SUBJECT_CHARS};

/// A layer of the stack below a service, lowest first (DESIGN section 8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // each variant is the field's own term
pub enum Layer {
    Vmm,
    Session,
    Kernel,
    Clock,
    Disk,
    Loopback,
    Interface,
    Tap,
    Routing,
    Nat,
    Service,
    Tailscale,
    Forward,
}

impl Layer {
    /// The layer's name as it stands in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Session => "session",
            Self::Kernel => "kernel",
            Self::Clock => "clock",
            Self::Disk => "disk",
            Self::Loopback => "loopback",
            Self::Interface => "interface",
            Self::Tap => "tap",
            Self::Routing => "routing",
            Self::Nat => "nat",
            Self::Service => "service",
            Self::Tailscale => "tailscale",
            Self::Forward => "forward",
        }
    }

    /// True for a layer whose failure leaves a guest ready all the same.
    #[must_use]
    pub fn advisory(self) -> bool {
        matches!(self, Self::Clock | Self::Forward | Self::Tailscale)
    }

    /// As [`Layer::advisory`] for one subject of the layer: what only waits for another boot harms nobody.
    #[must_use]
    pub fn advisory_for(self, subject: &str) -> bool {
        self.advisory() || (self == Self::Vmm && subject == MACHINE)
    }
}

/// The subject of [`Layer::Vmm`] that says what waits for another boot.
pub const MACHINE: &str = "machine";

impl std::fmt::Display for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Whether something holds. What was not observed is `Unknown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the three truth values
pub enum Status {
    True,
    False,
    Unknown,
}

impl Status {
    /// Both hold: `False` wins over `Unknown`, `Unknown` over `True`.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::False, _) | (_, Self::False) => Self::False,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            (Self::True, Self::True) => Self::True,
        }
    }
}

/// What a condition is about: one subject in one layer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The layer.
    pub layer: Layer,
    /// The subject in it, such as a service's name or a mount point; at most [`SUBJECT_CHARS`], no control characters.
    pub subject: String,
}

impl Key {
    /// Names a subject of a layer; a guest may have sent it, so it is cut to its limit and cleaned.
    #[must_use]
    pub fn new(layer: Layer, subject: impl Into<String>) -> Self {
        Self {
            layer,
            subject: within(subject.into(), SUBJECT_CHARS),
        }
    }
}

/// What was found, without the time of the finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether it holds.
    pub status: Status,
    /// A code for programs, in CamelCase, such as `Ready` or `CrashLoop`; at most [`REASON_CHARS`].
    pub reason: String,
    /// What was seen, for people; at most [`EVIDENCE_CHARS`] characters, no control characters.
    pub evidence: String,
}

impl Verdict {
    /// A finding; its texts are cut to their limits and stripped of control characters.
    #[must_use]
    pub fn new(status: Status, reason: impl Into<String>, evidence: impl AsRef<str>) -> Self {
        Self {
            status,
            reason: within(reason.into(), REASON_CHARS),
            evidence: clean(evidence.as_ref(), EVIDENCE_CHARS),
        }
    }

    /// It holds.
    #[must_use]
    pub fn yes(reason: impl Into<String>, evidence: impl AsRef<str>) -> Self {
        Self::new(Status::True, reason, evidence)
    }

    /// It was seen not to hold.
    #[must_use]
    pub fn no(reason: impl Into<String>, evidence: impl AsRef<str>) -> Self {
        Self::new(Status::False, reason, evidence)
    }

    /// It was not observed.
    #[must_use]
    pub fn unknown(reason: impl Into<String>, evidence: impl AsRef<str>) -> Self {
        Self::new(Status::Unknown, reason, evidence)
    }
}

/// The text itself where it is good, which it is but for hostile guests.
fn within(text: String, most: usize) -> String {
    match text.len() <= most && !text.contains(char::is_control) {
        true => text,
        false => clean(&text, most),
    }
}

/// One line without control characters, cut to so many characters.
fn clean(text: &str, most: usize) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(most)
        .collect()
}

/// A verdict on a key, with its times in milliseconds.
///
/// Ages and not times travel: the receiver stamps them with its own clock,
/// so that a wrong guest clock is harmless.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What it is about.
    #[serde(flatten)]
    pub key: Key,
    /// What was found.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Milliseconds since the observation, when the message was made.
    pub age_ms: u64,
    /// Milliseconds after the observation at which it turns `Unknown` by itself.
    pub valid_ms: u64,
    /// Milliseconds since the status last changed, when the message was made.
    pub since_ms: u64,
}

impl Condition {
    /// The condition as it reads `later_ms` milliseconds after the message was made.
    #[must_use]
    pub fn aged(&self, later_ms: u64) -> Self {
        let mut aged = self.clone();
        aged.age_ms = self.age_ms.saturating_add(later_ms);
        aged.since_ms = self.since_ms.saturating_add(later_ms);
        if aged.age_ms > aged.valid_ms && aged.verdict.status != Status::Unknown {
            aged.since_ms = aged.age_ms - aged.valid_ms;
            aged.verdict = Verdict::unknown(
                "Stale",
                format!(
                    "last seen {} ms ago as {:?} ({}): {}",
                    aged.age_ms, self.verdict.status, self.verdict.reason, self.verdict.evidence
                ),
            );
        }
        aged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(status: Status) -> Condition {
        Condition {
            key: Key::new(Layer::Service, "postgres"),
            verdict: Verdict::new(status, "Ready", "SELECT 1 answered"),
            age_ms: 10,
            valid_ms: 100,
            since_ms: 500,
        }
    }

    #[test]
    fn a_condition_turns_unknown_when_its_validity_has_passed() {
        let fresh = condition(Status::True).aged(90);
        assert_eq!(
            (fresh.verdict.status, fresh.age_ms, fresh.since_ms),
            (Status::True, 100, 590)
        );
        for seen in [Status::True, Status::False] {
            let stale = condition(seen).aged(95);
            assert_eq!(stale.verdict.status, Status::Unknown);
            assert_eq!(stale.verdict.reason, "Stale");
            assert_eq!(stale.since_ms, 5);
        }
    }

    #[test]
    fn evidence_is_one_line_within_its_limit() {
        let verdict = Verdict::no("X", "a\x1b[31m\nb".to_owned() + &"c".repeat(2_000));
        assert!(!verdict.evidence.contains(['\x1b', '\n']));
        assert_eq!(verdict.evidence.chars().count(), EVIDENCE_CHARS);
    }

    #[test]
    fn subject_and_reason_of_a_guest_are_bounded_as_well() {
        let long = format!("a\x1b{}", "ä".repeat(2_000));
        let key = Key::new(Layer::Disk, long.as_str());
        let verdict = Verdict::no(long.as_str(), "");
        assert_eq!(key.subject.chars().count(), SUBJECT_CHARS);
        assert_eq!(verdict.reason.chars().count(), REASON_CHARS);
        assert!(key.subject.starts_with("a ä") && verdict.reason.starts_with("a ä"));
        assert_eq!(Key::new(Layer::Disk, "a\nb").subject, "a b");
        assert_eq!(
            Key::new(Layer::Disk, "x".repeat(2_000)).subject.len(),
            SUBJECT_CHARS
        );
        let most = "x".repeat(SUBJECT_CHARS);
        assert_eq!(Key::new(Layer::Disk, most.as_str()).subject, most);
    }

    #[test]
    fn false_wins_over_unknown_over_true() {
        use Status::{False, True, Unknown};
        assert_eq!(True.and(True), True);
        assert_eq!(True.and(Unknown), Unknown);
        assert_eq!(Unknown.and(False), False);
    }

    #[test]
    fn clock_forwards_tailscale_and_what_waits_for_another_boot_are_advisory() {
        let advisory = [Layer::Clock, Layer::Forward, Layer::Tailscale];
        for layer in [Layer::Vmm, Layer::Session, Layer::Disk, Layer::Service]
            .into_iter()
            .chain(advisory)
        {
            assert_eq!(layer.advisory(), advisory.contains(&layer), "{layer}");
            assert_eq!(layer.advisory_for("x"), layer.advisory(), "{layer}");
            let machine = layer.advisory() || layer == Layer::Vmm;
            assert_eq!(layer.advisory_for(MACHINE), machine, "{layer}");
        }
        assert_eq!(format!("{:>6}", Layer::Vmm), "   vmm");
    }
}
