//! The graph of layers, and what follows from it: which broken thing explains the others.
//!
//! A graph and no ladder, because vsock works when every IP path is broken (DESIGN section 8). Owns the edges and
//! the rule of the verdict; never looks at anything itself.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::condition::Layer;

/// Where something can be broken: the two things that no guest is made of, and the layers of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Level {
    /// What is wanted: sovereign.toml.
    Configuration,
    /// The host agent of the instance.
    Host,
    /// A layer of one guest.
    Layer(Layer),
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 15] = [
        Self::Configuration,
        Self::Host,
        Self::Layer(Layer::Vmm),
        Self::Layer(Layer::Session),
        Self::Layer(Layer::Kernel),
        Self::Layer(Layer::Clock),
        Self::Layer(Layer::Disk),
        Self::Layer(Layer::Loopback),
        Self::Layer(Layer::Interface),
        Self::Layer(Layer::Tap),
        Self::Layer(Layer::Routing),
        Self::Layer(Layer::Nat),
        Self::Layer(Layer::Service),
        Self::Layer(Layer::Tailscale),
        Self::Layer(Layer::Forward),
    ];

    /// Its name in JSON: a layer's own, `configuration` or `host`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::Host => "host",
            Self::Layer(layer) => layer.as_str(),
        }
    }
}

impl From<Layer> for Level {
    fn from(layer: Layer) -> Self {
        Self::Layer(layer)
    }
}

impl From<Level> for String {
    fn from(level: Level) -> Self {
        level.as_str().to_owned()
    }
}

impl TryFrom<String> for Level {
    type Error = UnknownLevel;

    fn try_from(name: String) -> Result<Self, UnknownLevel> {
        let found = Self::ALL.into_iter().find(|level| level.as_str() == name);
        found.ok_or(UnknownLevel(name))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A name that no level has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no layer {0:?}")]
pub struct UnknownLevel(String);

/// Where Tailscale in a guest takes its packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TailscaleMode {
    /// In its own process: it needs no device and no address translation on the host.
    #[default]
    Userspace,
    /// Through a TUN device: the guest's packets leave through the host.
    Tun,
}

/// What a level stands on directly.
///
/// Only forwards stand on the host agent: guests outlive it, and can be asked without it. The clock is advisory: nothing
/// stands on it.
#[must_use]
pub fn needs(level: Level, tailscale: TailscaleMode) -> &'static [Level] {
    use Layer::{Disk, Interface, Kernel, Loopback, Nat, Routing, Service, Session, Tap, Vmm};
    let Level::Layer(layer) = level else { return &[] };
    match layer {
        Vmm => &[],
        Session => &[Level::Layer(Vmm)],
        Kernel | Layer::Clock => &[Level::Layer(Session)],
        Disk | Loopback | Interface => &[Level::Layer(Kernel)],
        Service => &[
            Level::Layer(Disk),
            Level::Layer(Loopback),
            Level::Layer(Interface),
        ],
        Tap => &[Level::Layer(Vmm)],
        Routing => &[Level::Layer(Tap)],
        Nat => &[Level::Layer(Routing)],
        Layer::Tailscale => match tailscale {
            TailscaleMode::Userspace => &[
                Level::Layer(Disk),
                Level::Layer(Loopback),
                Level::Layer(Interface),
            ],
            TailscaleMode::Tun => &[
                Level::Layer(Disk),
                Level::Layer(Loopback),
                Level::Layer(Interface),
                Level::Layer(Nat),
            ],
        },
        Layer::Forward => &[Level::Layer(Session), Level::Layer(Service), Level::Host],
    }
}

/// Everything that a level stands on, near or far.
#[must_use]
pub fn ancestors(level: Level, tailscale: TailscaleMode) -> BTreeSet<Level> {
    let mut found = BTreeSet::new();
    let mut open = needs(level, tailscale).to_vec();
    while let Some(next) = open.pop() {
        if found.insert(next) {
            open.extend(needs(next, tailscale));
        }
    }
    found
}

/// What is known of one node, before the graph is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It answered, and all is well.
    Holds,
    /// It was seen to be broken.
    Broken,
    /// It was not observed.
    Unobserved,
}

/// What the graph makes of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Explanation<K> {
    /// It answered, whatever is broken below it.
    Holds,
    /// It is broken and nothing below it is: a finding.
    Root,
    /// It did not answer, and these roots below it explain that.
    Blocked(Vec<K>),
    /// It was not observed, and nothing below it explains that.
    Unexplained,
}

/// The verdict: every broken node without a broken ancestor is a root; what else did not answer and stands on a root is
/// blocked by it. `is_below(a, b)` says that `b` stands on `a`, near or far; it must have no cycle.
#[must_use]
pub fn explain<K: Clone>(nodes: &[(K, Standing)], is_below: impl Fn(&K, &K) -> bool) -> Vec<Explanation<K>> {
    let broken_below = |key: &K| {
        let mut below = nodes.iter();
        below.any(|(other, standing)| *standing == Standing::Broken && is_below(other, key))
    };
    let roots: Vec<&K> = nodes
        .iter()
        .filter(|(key, standing)| *standing == Standing::Broken && !broken_below(key))
        .map(|(key, _)| key)
        .collect();
    let blocked = |key: &K| -> Vec<K> {
        let below = roots.iter().filter(|root| is_below(root, key));
        below.map(|root| (*root).clone()).collect()
    };
    let explain = |(key, standing): &(K, Standing)| match (standing, blocked(key)) {
        (Standing::Holds, _) => Explanation::Holds,
        (Standing::Broken, by) if by.is_empty() => Explanation::Root,
        (Standing::Unobserved, by) if by.is_empty() => Explanation::Unexplained,
        (Standing::Broken | Standing::Unobserved, by) => Explanation::Blocked(by),
    };
    nodes.iter().map(explain).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NODES: usize = 12;

    /// A random graph without cycles (an edge leads from a lower to a higher number), as its closure.
    fn graph() -> impl Strategy<Value = Vec<Vec<bool>>> {
        proptest::collection::vec(proptest::bool::weighted(0.3), NODES * NODES).prop_map(|bits| {
            let mut below = vec![vec![false; NODES]; NODES];
            for high in 0..NODES {
                for low in 0..high {
                    if bits[high * NODES + low] {
                        below[low][high] = true;
                        for row in &mut below[..low] {
                            row[high] |= row[low];
                        }
                    }
                }
            }
            below
        })
    }

    fn standings() -> impl Strategy<Value = Vec<(usize, Standing)>> {
        let standing = prop_oneof![
            Just(Standing::Holds),
            Just(Standing::Broken),
            Just(Standing::Unobserved)
        ];
        proptest::collection::vec(standing, NODES)
            .prop_map(|all| all.into_iter().enumerate().collect::<Vec<_>>())
            .prop_shuffle()
    }

    proptest! {
        #[test]
        fn every_node_is_explained_and_none_that_answered_is_blocked(
            below in graph(), nodes in standings()
        ) {
            let explanations = explain(&nodes, |low, high| below[*low][*high]);
            let roots: Vec<usize> = nodes.iter().zip(&explanations)
                .filter(|(_, e)| **e == Explanation::Root).map(|((key, _), _)| *key).collect();
            prop_assert_eq!(explanations.len(), nodes.len());
            for ((key, standing), explanation) in nodes.iter().zip(&explanations) {
                let broken_below = nodes.iter().any(|(k, s)| *s == Standing::Broken && below[*k][*key]);
                match explanation {
                    Explanation::Holds => prop_assert_eq!(*standing, Standing::Holds),
                    Explanation::Root => prop_assert!(*standing == Standing::Broken && !broken_below),
                    Explanation::Unexplained => {
                        prop_assert!(*standing == Standing::Unobserved && !broken_below);
                    }
                    Explanation::Blocked(by) => {
                        prop_assert!(*standing != Standing::Holds && !by.is_empty());
                        prop_assert!(by.iter().all(|root| roots.contains(root) && below[*root][*key]));
                        let all = roots.iter().filter(|root| below[**root][*key]).count();
                        prop_assert_eq!(by.len(), all);
                    }
                }
            }
        }

        #[test]
        fn something_broken_has_a_root_and_nothing_broken_has_none(
            below in graph(), nodes in standings()
        ) {
            let explanations = explain(&nodes, |low, high| below[*low][*high]);
            let broken = nodes.iter().any(|(_, standing)| *standing == Standing::Broken);
            prop_assert_eq!(explanations.contains(&Explanation::Root), broken);
        }

        #[test]
        fn the_order_of_the_nodes_does_not_matter(below in graph(), nodes in standings()) {
            let is_below = |low: &usize, high: &usize| below[*low][*high];
            let mut sorted = nodes.clone();
            sorted.sort_by_key(|(key, _)| *key);
            let mut shuffled: Vec<_> = nodes.iter().map(|(key, _)| *key).zip(explain(&nodes, is_below)).collect();
            shuffled.sort_by_key(|(key, _)| *key);
            for ((_, one), other) in shuffled.iter().zip(explain(&sorted, is_below)) {
                let sort = |explanation: &Explanation<usize>| match explanation {
                    Explanation::Blocked(by) => {
                        let mut by = by.clone();
                        by.sort_unstable();
                        Explanation::Blocked(by)
                    }
                    other => other.clone(),
                };
                prop_assert_eq!(sort(one), sort(&other));
            }
        }

        #[test]
        fn a_healthy_graph_has_no_finding(below in graph()) {
            let nodes: Vec<_> = (0..NODES).map(|node| (node, Standing::Holds)).collect();
            let explanations = explain(&nodes, |low, high| below[*low][*high]);
            prop_assert!(explanations.iter().all(|e| *e == Explanation::Holds));
        }
    }

    fn names(level: Layer, mode: TailscaleMode) -> Vec<&'static str> {
        let found = ancestors(level.into(), mode);
        found.into_iter().map(Level::as_str).collect()
    }

    #[test]
    fn the_layers_stand_on_each_other_as_the_design_says() {
        use TailscaleMode::{Tun, Userspace};
        assert_eq!(names(Layer::Session, Userspace), ["vmm"]);
        let service = ["vmm", "session", "kernel", "disk", "loopback", "interface"];
        assert_eq!(names(Layer::Service, Userspace), service);
        assert_eq!(names(Layer::Tailscale, Userspace), service, "service's ancestors");
        let tun = [&service[..], &["tap", "routing", "nat"]].concat();
        assert_eq!(names(Layer::Tailscale, Tun), tun);
        assert_eq!(
            names(Layer::Nat, Userspace),
            ["vmm", "tap", "routing"],
            "no session"
        );
        assert_eq!(
            names(Layer::Forward, Userspace),
            [&["host"], &service[..], &["service"]].concat()
        );
        assert_eq!(names(Layer::Clock, Userspace), ["vmm", "session"]);
        for level in Level::ALL {
            for mode in [Userspace, Tun] {
                let below = ancestors(level, mode);
                assert!(!below.contains(&level), "a cycle through {level}");
                assert!(
                    !below.contains(&Level::Layer(Layer::Clock)),
                    "the clock is advisory"
                );
            }
        }
    }

    #[test]
    fn every_level_has_its_own_name_and_reads_back() {
        let names: BTreeSet<&str> = Level::ALL.into_iter().map(Level::as_str).collect();
        assert_eq!(names.len(), Level::ALL.len());
        for level in Level::ALL {
            let text = serde_json::to_string(&level).unwrap();
            assert_eq!(text, format!("\"{level}\""));
            assert_eq!(serde_json::from_str::<Level>(&text).unwrap(), level);
        }
        let error = serde_json::from_str::<Level>("\"cable\"").unwrap_err();
        assert!(error.to_string().contains("there is no layer \"cable\""));
    }
}
