//! Configuration and host agent, VMM and session, and the host's side of the network.

use sovereign_protocol::condition::Layer::{Nat, Routing, Session, Tap, Vmm};
use sovereign_protocol::layers::Level;

use super::Kind::{Consequence, Fault, Passing};
use super::{ANY, Check, Entry, Fix, LOGS, RESTART, STATUS, WAIT, check, entry};

const fn own(level: Level, code: &'static str, what: &'static str, check: Check, fix: Fix) -> Entry {
    Entry {
        level,
        code,
        kind: Fault,
        what,
        check,
        fix,
    }
}

const UP_ADOPTS: Fix = Fix {
    run: "{sovereign} up",
    automatic: true,
    risk: "none: guests that run are adopted with their boot; the configuration is applied as it is now",
};
const RESTART_AGENT: Fix = Fix {
    run: "kill {pid} && {sovereign} up",
    automatic: false,
    risk: "forwards are cut until the new agent serves them; guests run on",
};
const CONTINUE: Fix = Fix {
    run: "kill -CONT {pid}",
    automatic: false,
    risk: "whoever stopped it may have had a reason, such as a debugger; a guest's clock is corrected afterwards",
};
const ROOM: Fix = Fix {
    run: "du -xh --max-depth=1 {state} && df -h {state}",
    automatic: false,
    risk: "it only shows what takes the room; what may be deleted is yours to know",
};
const KILL_VMM: Fix = Fix {
    run: "kill -KILL {pid}",
    automatic: false,
    risk: "like a power cut for the guest, which is then booted again: PostgreSQL replays its log",
};
const STATUS_ANSWERS: Check = check(
    "{sovereign} status",
    "it lists conditions instead of `nothing running`",
);
const PROCESS_STATE: Check = check(
    "ps -o pid,stat,args -p {pid}",
    "there is no such process, or its STAT does not begin with T",
);
const PROCESS_RUNS: Check = check("ps -o pid,stat,args -p {pid}", "the VMM's process is there");
const CONSOLE_PANIC: Check = check(
    "{sovereign} logs {guest}",
    "no line says `Kernel panic - not syncing`",
);
const ROUTES: Check = check(
    "ip route show default table all",
    "it lists a default route by a link that is up",
);
const RESOLVERS: Check = check(
    "cat /etc/resolv.conf /run/systemd/resolve/resolv.conf",
    "one of them names a server that is not on the loopback",
);
const RESOLVER_NAMED: Fix = Fix {
    run: "{sovereign} up",
    automatic: false,
    risk: "after network.dns is set in sovereign.toml: guests ask that server from then on, without a reboot",
};
const FILTERS: Check = check(
    "nft list tables; iptables-save | head",
    "one of the two answers, and no table of somebody else has our name",
);
const RESTART_WAIT: Fix = Fix {
    run: "{sovereign} watch",
    automatic: false,
    risk: "it only shows: guests follow by themselves when this host has a way out again; see network.uplink and \
           network.vpn in docs/configuration.md",
};
const EVENTS: Check = check(
    "{sovereign} events --guest {guest} --last 20",
    "the last event of layer vmm is ✓ Running",
);
const EXEC: Check = check(
    "timeout 10 {sovereign} exec {guest} -- uname -r",
    "it prints the guest's kernel version",
);
const CONSOLE_MOVES: Check = check(
    "{sovereign} logs {guest}",
    "its last lines are newer than this finding",
);

pub(super) const ENTRIES: &[Entry] = &[
    own(
        Level::Configuration,
        "NoConfiguration",
        "There is no sovereign.toml, so nothing is wanted yet.",
        check("ls sovereign.toml", "the file is there"),
        Fix {
            run: "{sovereign} init && {sovereign} up",
            automatic: false,
            risk: "it writes a commented sovereign.toml here and starts what that says",
        },
    ),
    own(
        Level::Configuration,
        ANY,
        "The configuration cannot be used: `up` will refuse it, and what runs goes on as last applied.",
        check(
            "cat -A {config}",
            "the line and key of the evidence read otherwise",
        ),
        Fix {
            run: "{next}",
            automatic: false,
            risk: "none: a wrong file changes nothing",
        },
    ),
    own(
        Level::Host,
        "NothingRuns",
        "Nothing runs as instance {instance}: no host agent, and no guest that one left behind.",
        STATUS_ANSWERS,
        UP_ADOPTS,
    ),
    own(
        Level::Host,
        "HostAgentDown",
        "The host agent ended without stopping its guests: those that run go on, but nobody restarts them, asks them or serves their forwards.",
        STATUS_ANSWERS,
        UP_ADOPTS,
    ),
    own(
        Level::Host,
        "HostAgentStopped",
        "The host agent's process is stopped (SIGSTOP): it answers nobody until it is continued.",
        PROCESS_STATE,
        CONTINUE,
    ),
    own(
        Level::Host,
        "HostAgentSilent",
        "The host agent's process is there and does not answer.",
        STATUS_ANSWERS,
        RESTART_AGENT,
    ),
    own(
        Level::Host,
        "HostAgentNotListening",
        "A host agent holds this instance's lock and does not listen: it starts or ends just now, or is stuck in that.",
        STATUS_ANSWERS,
        RESTART_AGENT,
    ),
    own(
        Level::Host,
        "VersionMismatch",
        "The host agent that runs is of another version and speaks no common protocol with this `sovereign`.",
        check("{sovereign} --version", "it names the version of the evidence"),
        RESTART_AGENT,
    ),
    own(
        Level::Host,
        "MissingBinary",
        "sovereign-host does not lie beside sovereign: no host agent can be started or looked past.",
        check(
            "ls -l \"$(dirname \"$(readlink -f \"$(command -v sovereign)\")\")\"",
            "sovereign-host is listed",
        ),
        Fix {
            run: "make build",
            automatic: false,
            risk: "none: it builds the binaries that belong together",
        },
    ),
    own(
        Level::Host,
        ANY,
        "The host agent cannot be spoken to ({code}).",
        STATUS_ANSWERS,
        RESTART_AGENT,
    ),
    entry(
        Vmm,
        "Starting",
        Passing,
        "The virtual machine of {guest} was started and has not said anything yet.",
        STATUS,
        WAIT,
    ),
    entry(
        Vmm,
        "Stopping",
        Passing,
        "Guest {guest} is being stopped because somebody asked for it.",
        STATUS,
        WAIT,
    ),
    entry(
        Vmm,
        "RestartNeeded",
        Consequence,
        "Something of {guest} is configured otherwise and is in force after its next boot.",
        STATUS,
        RESTART,
    ),
    entry(
        Vmm,
        "NotRunning",
        Fault,
        "No virtual machine runs for {guest}.",
        STATUS_ANSWERS,
        UP_ADOPTS,
    ),
    entry(
        Vmm,
        "PoweredOff",
        Fault,
        "Guest {guest} is powered off, from inside or by `down`, and is not started again by itself.",
        EVENTS,
        UP_ADOPTS,
    ),
    entry(
        Vmm,
        "Killed",
        Fault,
        "The virtual machine of {guest} was ended, because it did not stop in time or on a signal.",
        EVENTS,
        UP_ADOPTS,
    ),
    entry(
        Vmm,
        "GuestRebooted",
        Passing,
        "Guest {guest} rebooted, and its next boot begins.",
        EVENTS,
        WAIT,
    ),
    entry(
        Vmm,
        "GuestPanicked",
        Passing,
        "The kernel of {guest} panicked and its virtual machine ended; it is booted again a few times.",
        CONSOLE_PANIC,
        WAIT,
    ),
    entry(
        Vmm,
        "Crashed",
        Passing,
        "The virtual machine of {guest} ended by itself or by a foreign signal; it is booted again a few times.",
        EVENTS,
        WAIT,
    ),
    entry(
        Vmm,
        "ShimDied",
        Passing,
        "The shim of {guest} was killed, and its virtual machine ended with it, as by a power cut.",
        PROCESS_RUNS,
        UP_ADOPTS,
    ),
    entry(
        Vmm,
        "ShimSilent",
        Fault,
        "The shim of {guest} accepts and does not answer, so nobody can speak to its virtual machine.",
        PROCESS_STATE,
        RESTART,
    ),
    entry(
        Vmm,
        "StartFailed",
        Passing,
        "The virtual machine of {guest} could not be started; it is tried again a few times.",
        check(
            "{sovereign} events --guest {guest} --last 5",
            "the last event of layer vmm is ✓ Running",
        ),
        WAIT,
    ),
    entry(
        Vmm,
        "CrashLoop",
        Fault,
        "The virtual machine of {guest} ended five times within two minutes and is not started again by itself.",
        EVENTS,
        Fix {
            run: "{sovereign} logs {guest}; {sovereign} up",
            automatic: false,
            risk: "it ends again in the same way unless the cause that the console names is gone",
        },
    ),
    entry(
        Vmm,
        "Paused",
        Fault,
        "The virtual machine of {guest} is paused: nothing in it can answer, and nothing is lost.",
        check("{sovereign} status", "layer vmm says Running"),
        RESTART,
    ),
    entry(
        Vmm,
        "Stopped",
        Fault,
        "The process of {guest}'s virtual machine is stopped (SIGSTOP): nothing in it can answer, and nothing is lost.",
        PROCESS_STATE,
        CONTINUE,
    ),
    entry(
        Vmm,
        "HostDiskFull",
        Fault,
        "The host's disk is full: {guest} stands still, loses nothing, and goes on by itself when there is room.",
        check(
            "df -h {state}",
            "more than 16 MiB are free, and two seconds later `sovereign status` still says so",
        ),
        ROOM,
    ),
    entry(
        Vmm,
        "Stuck",
        Fault,
        "The virtual machine of {guest} stands still with an error of its own.",
        check("{sovereign} status", "layer vmm says Running a few seconds later"),
        RESTART,
    ),
    entry(
        Vmm,
        "Silent",
        Fault,
        "The virtual machine of {guest} does not answer its machine protocol: its process hangs.",
        check("{sovereign} status", "layer vmm says Running a few seconds later"),
        KILL_VMM,
    ),
    entry(
        Vmm,
        ANY,
        Fault,
        "The virtual machine of {guest} does not run as it should ({code}).",
        EVENTS,
        LOGS,
    ),
    entry(
        Session,
        "Dialling",
        Passing,
        "Guest {guest} boots: its agent has not answered yet.",
        CONSOLE_MOVES,
        WAIT,
    ),
    entry(
        Session,
        "NotApplied",
        Passing,
        "Guest {guest} has not yet taken over what is wanted of it.",
        STATUS,
        WAIT,
    ),
    entry(
        Session,
        "Lost",
        Fault,
        "The machine of {guest} runs, but its agent no longer answers; what it said last is not known to hold any more.",
        EXEC,
        LOGS,
    ),
    entry(
        Session,
        "Silent",
        Fault,
        "The agent of {guest} is there and does not answer: it is stuck or stopped, and the guest's init restarts it after 20 s of silence.",
        EXEC,
        LOGS,
    ),
    entry(
        Session,
        "NotListening",
        Fault,
        "Nobody listens at the agent's port of {guest}: the guest still boots, or its agent is dead and not yet restarted.",
        EXEC,
        LOGS,
    ),
    entry(
        Session,
        "NotAccepted",
        Fault,
        "The virtual machine of {guest} does not take a new connection: it does not move, or its vsock device is stuck.",
        EXEC,
        LOGS,
    ),
    entry(
        Session,
        "NoDevice",
        Fault,
        "The vsock device of {guest} cannot be reached, although its shim runs.",
        EXEC,
        RESTART,
    ),
    entry(
        Session,
        "Refused",
        Fault,
        "The agent of {guest} answers and cannot prove that it is of this boot or version.",
        EXEC,
        RESTART,
    ),
    entry(
        Session,
        "SpecRefused",
        Fault,
        "The agent of {guest} refuses what is wanted of it and stays on what it runs.",
        STATUS,
        Fix {
            run: "edit the setting that the evidence names, then: {sovereign} up",
            automatic: false,
            risk: "none: a refused document changes nothing in the guest",
        },
    ),
    entry(
        Session,
        "NotDialled",
        Consequence,
        "The agent of {guest} cannot be asked.",
        EXEC,
        WAIT,
    ),
    entry(
        Session,
        ANY,
        Fault,
        "The link to the agent of {guest} is not well ({code}).",
        EXEC,
        LOGS,
    ),
    entry(
        Tap,
        "NetworkFailed",
        Fault,
        "The private network of {guest} cannot be made; the link to its agent needs none of it.",
        STATUS,
        RESTART,
    ),
    entry(
        Tap,
        "NoCard",
        Fault,
        "Guest {guest} booted without a network card, because the network was not there in time.",
        STATUS,
        RESTART,
    ),
    entry(
        Tap,
        "NoCarrier",
        Fault,
        "No process holds the TAP of {guest}: its virtual machine is not attached to the network.",
        PROCESS_RUNS,
        RESTART,
    ),
    entry(
        Tap,
        ANY,
        Fault,
        "The host's end of {guest}'s network ({subject}) is not as it should be ({code}); the link to its agent needs none of it.",
        STATUS,
        RESTART,
    ),
    entry(
        Routing,
        "NoWayOut",
        Fault,
        "Guests have no way out, because this host has none for them; what needs no other host works.",
        ROUTES,
        RESTART_WAIT,
    ),
    entry(
        Routing,
        "Blocked",
        Fault,
        "A VPN of this host is up, and the configuration keeps guests from leaving meanwhile.",
        ROUTES,
        RESTART_WAIT,
    ),
    entry(
        Routing,
        "NoResolver",
        Fault,
        "Guests have a way out and no name server: what this host asks itself is of no use to them.",
        RESOLVERS,
        RESOLVER_NAMED,
    ),
    entry(
        Routing,
        "RoutingFailed",
        Fault,
        "Routes, rules or switches of this host that guests need cannot be set.",
        STATUS,
        RESTART,
    ),
    entry(
        Routing,
        ANY,
        Fault,
        "The host does not route for {guest} as it should ({code}).",
        STATUS,
        RESTART,
    ),
    entry(
        Nat,
        "FilterFailed",
        Fault,
        "The packet filter that lets guests out and forwards ports to them cannot be made, so guests have no way out.",
        FILTERS,
        RESTART,
    ),
    entry(
        Nat,
        ANY,
        Fault,
        "The host does not translate addresses for {guest} as it should ({code}), so the guest has no way out.",
        STATUS,
        RESTART,
    ),
];
