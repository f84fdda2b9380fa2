//! How what is there differs from what is wanted, for people.

use std::collections::BTreeSet;
use std::fmt;

use super::{Rule, Standing, Table, Tables};

/// One thing that is not as wanted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// What `nft` is told of it: `inet sv5pkj`, or `inet sv5pkj forward`.
    pub object: String,
    /// What about it.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.what)
    }
}

/// What is not as wanted, a line for each table or chain; empty when both are equal.
#[must_use]
pub fn differences(wanted: &Tables, there: &Tables) -> Vec<Difference> {
    let same = |a: &Table, b: &Table| (a.family, &a.name) == (b.family, &b.name);
    let mut found = Vec::new();
    let mut say = |object: String, what: &str| {
        let what = what.to_owned();
        found.push(Difference { object, what });
    };
    for table in wanted {
        match there.iter().find(|other| same(table, other)) {
            None => say(table.to_string(), "missing"),
            Some(other) => of_table(table, other, &mut say),
        }
    }
    for table in there
        .iter()
        .filter(|table| !wanted.iter().any(|other| same(table, other)))
    {
        say(table.to_string(), "not wanted any more");
    }
    found
}

fn of_table(wanted: &Table, there: &Table, say: &mut impl FnMut(String, &str)) {
    if wanted.standing != there.standing {
        let what = match there.standing {
            Standing::AsWanted => "held as it should not be".to_owned(),
            Standing::Dormant => "switched off".to_owned(),
            Standing::Unowned => "owned by nobody".to_owned(),
            Standing::Persistent => "owned, or kept for an owner".to_owned(),
            Standing::Held(port) => format!("owned by the netlink socket with port {port}"),
            Standing::Unknown(flags) => format!("has flags {flags:#x}"),
        };
        say(wanted.to_string(), &what);
    }
    if wanted.comment != there.comment {
        say(wanted.to_string(), "made by another version");
    }
    if wanted.strangers != there.strangers {
        say(
            wanted.to_string(),
            &format!("{} objects of others", there.strangers),
        );
    }
    let names: BTreeSet<_> = wanted.chains.keys().chain(there.chains.keys()).collect();
    for name in names {
        let chain = format!("{wanted} {}", name.escape_debug());
        match (wanted.chains.get(name), there.chains.get(name)) {
            (Some(_), None) => say(chain, "missing"),
            (None, _) => say(chain, "not ours"),
            (Some(ours), Some(theirs)) => {
                if (&ours.hook, &ours.oddities) != (&theirs.hook, &theirs.oddities) {
                    say(chain.clone(), "hooked in another way");
                }
                if let Some(what) = of_rules(&ours.rules, &theirs.rules) {
                    say(chain, &what);
                }
            }
        }
    }
}

fn of_rules(wanted: &[Rule], there: &[Rule]) -> Option<String> {
    if wanted == there {
        return None;
    }
    let named = |rule: &Rule| match rule.comment.as_str() {
        "" => "a rule without a name".to_owned(),
        comment => format!("\"{}\"", comment.escape_debug()),
    };
    let (ours, theirs): (BTreeSet<_>, BTreeSet<_>) = (wanted.iter().collect(), there.iter().collect());
    let (missing, foreign) = (ours.difference(&theirs), theirs.difference(&ours));
    let counts = (missing.clone().count(), foreign.clone().count());
    let first = |mut rules: std::collections::btree_set::Difference<'_, &Rule>| {
        rules.next().map(|rule| named(rule)).unwrap_or_default()
    };
    Some(match counts {
        (0, 0) => "rules in another order, or twice".to_owned(),
        (0, 1) => format!("{} is not ours", first(foreign)),
        (0, count) => format!("{count} rules are not ours, {} the first", first(foreign)),
        (1, 0) => format!("{} is missing", first(missing)),
        (count, 0) => format!("{count} rules are missing, {} the first", first(missing)),
        (missing, foreign) => format!("{missing} rules are missing, {foreign} are not ours"),
    })
}
