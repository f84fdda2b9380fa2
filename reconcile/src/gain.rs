//! Families of IP that a machine gains: who looked once, at its start, has to look again. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::family::Family;

/// A family that is there for so long is there to stay: an address of IPv6 comes a moment after the route, and a link that
/// comes up may go down again.
pub const GAINED_MS: u64 = 1_000;

/// The families that there are, and since when.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gains {
    since_ms: BTreeMap<Family, u64>,
    lasting: BTreeSet<Family>,
}

impl Gains {
    /// Takes a look in. One that is lost counts from the beginning when it comes back.
    pub fn look(&mut self, there: &BTreeSet<Family>, now_ms: u64) {
        self.since_ms.retain(|family, _| there.contains(family));
        for family in there {
            self.since_ms.entry(*family).or_insert(now_ms);
        }
        let lasts = |since_ms: &u64| now_ms.saturating_sub(*since_ms) >= GAINED_MS;
        let lasting = self.since_ms.iter().filter(|(_, since_ms)| lasts(since_ms));
        self.lasting = lasting.map(|(family, _)| *family).collect();
    }

    /// The families that are there to stay, as of the last look.
    #[must_use]
    pub fn lasting(&self) -> &BTreeSet<Family> {
        &self.lasting
    }

    /// When the next look is due although nothing happens, in the milliseconds of [`Gains::look`].
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        let new = self
            .since_ms
            .iter()
            .filter(|(family, _)| !self.lasting.contains(family));
        let due = new.map(|(_, since_ms)| since_ms.saturating_add(GAINED_MS));
        due.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_gained_when_it_has_lasted_and_lost_at_once() {
        let (none, four) = (BTreeSet::new(), BTreeSet::from([Family::V4]));
        let both = BTreeSet::from(Family::BOTH);
        let mut gains = Gains::default();
        gains.look(&none, 0);
        assert_eq!((gains.lasting(), gains.due_ms()), (&none, None));
        gains.look(&four, 10);
        gains.look(&four, 9 + GAINED_MS);
        assert_eq!((gains.lasting(), gains.due_ms()), (&none, Some(10 + GAINED_MS)));
        gains.look(&four, 10 + GAINED_MS);
        assert_eq!((gains.lasting(), gains.due_ms()), (&four, None));

        // IPv6 comes, goes before it has lasted, and comes again.
        gains.look(&both, 5_000);
        assert_eq!(gains.due_ms(), Some(5_000 + GAINED_MS));
        gains.look(&four, 5_500);
        assert_eq!(gains.due_ms(), None);
        gains.look(&both, 5_900);
        gains.look(&both, 6_500);
        assert_eq!(
            (gains.lasting(), gains.due_ms()),
            (&four, Some(5_900 + GAINED_MS))
        );
        gains.look(&both, 7_000);
        assert_eq!((gains.lasting(), gains.due_ms()), (&both, None));

        gains.look(&none, 7_001);
        assert_eq!((gains.lasting(), gains.due_ms()), (&none, None));
    }
}
