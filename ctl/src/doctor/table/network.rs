//! The codes of findings about what others did to the host's network, for where only the code is known: a condition, or
//! docs. The host agent's own finding names links, rules and chains.

use sovereign_protocol::condition::Layer::{Nat, Routing, Tap};

use super::Kind::Fault;
use super::{Check, Entry, Fix, check, entry};

/// The finding itself has the command.
const TOLD: Fix = Fix {
    run: "{sovereign} doctor",
    automatic: false,
    risk: "none: its finding names what is in the way and the command that helps",
};

const fn leftover(run: &'static str) -> Fix {
    Fix {
        run,
        automatic: false,
        risk: "whatever relied on it, such as an old script, goes other ways then",
    }
}

const RULES: Check = check("ip rule show", "no foreign rule is before ours");
const WAYS: Check = check(
    "{sovereign} doctor --json",
    "under network.probes each way names the link and the rule that are meant",
);
const CHAINS: Check = check(
    "nft list ruleset; iptables-save; ip6tables-save",
    "no chain at FORWARD of another program drops or refuses what guests send or get",
);

pub(super) const ENTRIES: &[Entry] = &[
    entry(
        Tap,
        "AddressConflict",
        Fault,
        "Another link of this host is in the guests' subnet, so no address of ours is set there.",
        check("ip address show", "no other link has an address in that subnet"),
        TOLD,
    ),
    entry(
        Routing,
        "RouteConflict",
        Fault,
        "A route of another program leads addresses of the guests' subnet elsewhere.",
        check(
            "ip route show table all",
            "every route to the guests' subnet is by their bridge",
        ),
        TOLD,
    ),
    entry(
        Routing,
        "LookupMain",
        Fault,
        "A rule looks everything up in main before all others, as old scripts left it.",
        RULES,
        leftover("{sovereign} doctor --fix=rule-lookup-main"),
    ),
    entry(
        Routing,
        "DefaultInMain",
        Fault,
        "The main table has a default route on a phone whose netd never puts one there, as old scripts left it.",
        check("ip route show table main default", "it prints nothing"),
        leftover("{sovereign} doctor --fix=default-in-main"),
    ),
    entry(
        Routing,
        "ForeignRule",
        Fault,
        "A rule of another program decides about guests' packets in the place of ours.",
        RULES,
        TOLD,
    ),
    entry(
        Routing,
        "StrictReversePath",
        Fault,
        "Packets for guests are dropped on a link by which answers would not leave, because rp_filter is strict there.",
        check(
            "sysctl -a -r rp_filter",
            "the larger of the link's and of all is 0 or 2",
        ),
        TOLD,
    ),
    entry(
        Routing,
        "WrongWay",
        Fault,
        "The kernel would send guests' packets another way than the one that is meant, or none.",
        WAYS,
        TOLD,
    ),
    entry(
        Routing,
        "MtuBlackHole",
        Fault,
        "The way out carries less than guests send and nothing tells their peers, so large answers may never arrive.",
        WAYS,
        TOLD,
    ),
    entry(
        Nat,
        "ForwardDrop",
        Fault,
        "The packet filter of another program stops what guests send or get.",
        CHAINS,
        TOLD,
    ),
    entry(
        Nat,
        "ForwardMayDrop",
        Fault,
        "The packet filter of another program may stop what guests send or get: not all of it can be followed.",
        CHAINS,
        TOLD,
    ),
    entry(
        Nat,
        "BridgeFiltered",
        Fault,
        "Frames from guest to guest pass this machine's FORWARD chains, and a foreign one stops them.",
        check("sysctl net.bridge.bridge-nf-call-iptables", "it is 0"),
        TOLD,
    ),
    entry(
        Nat,
        "PortTaken",
        Fault,
        "A rule of another program takes a port that is to lead to a guest.",
        check(
            "iptables -t nat -S; ip6tables -t nat -S",
            "no foreign rule names the port",
        ),
        TOLD,
    ),
    entry(
        Nat,
        "DuplicateRules",
        Fault,
        "Rules of iptables that name guests stand several times, as scripts that append without looking leave them.",
        check("iptables-save | sort | uniq -d", "it prints no such rule"),
        leftover("{sovereign} doctor --fix=duplicate-rules"),
    ),
];
