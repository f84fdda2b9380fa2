//! What a guest is for: services, Tailscale, forwards.

use sovereign_protocol::condition::Layer::{Forward, Service, Tailscale};

use super::Kind::{Consequence, Fault, Passing};
use super::{ANY, Check, Entry, Fix, LOGS, RESTART, STATUS, WAIT, check, entry};

const LOG_IN: Check = check("timeout 10 {sovereign} psql {guest} -c 'select 1'", "it prints 1");
const PROCESSES: Check = check(
    "{sovereign} exec {guest} -- busybox ps",
    "the service's processes are there and run",
);
const EVENTS: Check = check(
    "{sovereign} events --guest {guest} --last 20",
    "the last event of the service is ✓ Ready",
);
const CONTINUE: Fix = Fix {
    run: "{sovereign} exec {guest} -- busybox killall -CONT postgres",
    automatic: true,
    risk: "none: it continues processes that are stopped and nothing else; if it stays silent, `down` ends it hard after 25 s",
};
const SETTINGS: Fix = Fix {
    run: "edit the setting that the evidence names, then: {sovereign} up",
    automatic: false,
    risk: "none: the service is tried again with the changed settings only",
};
const LISTENERS: Check = check(
    "ss -ltnp 'sport = :{port}'",
    "nobody or sovereign-host listens there",
);
const OTHER_PORT: Fix = Fix {
    run: "end the program that has port {port}, or edit `listen` of the forward; then: {sovereign} up",
    automatic: false,
    risk: "clients of the old port must be told",
};
const WAITING: Check = check(
    "ss -lntup",
    "no program waits on {port}, but for 127.0.0.1 and ::1",
);
const TRANSLATIONS: Check = check(
    "nft list ruleset; iptables-save -t nat",
    "a rule of ours translates port {port} to the guest's address",
);
const BY_VSOCK: Fix = Fix {
    run: "put right what the evidence names, or take `via = \"kernel\"` from the forward; then: {sovereign} up",
    automatic: false,
    risk: "without `via = \"kernel\"` it is one TCP port, and the guest sees this machine as its client",
};
const TAILSCALED: Check = check(
    "{sovereign} exec {guest} -- tailscale status",
    "it lists peers and no warning",
);

const fn tailscale(code: &'static str, what: &'static str, fix: Fix) -> Entry {
    entry(Tailscale, code, Fault, what, TAILSCALED, fix)
}

pub(super) const ENTRIES: &[Entry] = &[
    entry(
        Service,
        "Waiting",
        Consequence,
        "Service {subject} of {guest} waits for the first look at the data disk.",
        STATUS,
        WAIT,
    ),
    entry(
        Service,
        "DiskMissing",
        Consequence,
        "Service {subject} of {guest} is not started, because the data disk is not good.",
        STATUS,
        WAIT,
    ),
    entry(
        Service,
        "WaitsFor",
        Consequence,
        "Service {subject} of {guest} waits for a service of another guest.",
        STATUS,
        WAIT,
    ),
    entry(
        Service,
        "NoNetworkBetween",
        Fault,
        "Service {subject} of {guest} needs a service of another guest, and there is no network between them.",
        STATUS,
        Fix {
            run: "make what the evidence names possible, or let one who may open /dev/net/tun run it; then: {sovereign} down && {sovereign} up",
            automatic: false,
            risk: "all guests of the instance stop in order and boot again",
        },
    ),
    entry(
        Service,
        "Unreachable",
        Passing,
        "Service {subject} of {guest} is not started: the database that it needs does not answer from there.",
        EVENTS,
        WAIT,
    ),
    entry(
        Service,
        "Granting",
        Passing,
        "Role and database of {subject} in {guest} are being made.",
        EVENTS,
        WAIT,
    ),
    entry(
        Service,
        "NoProgram",
        Fault,
        "The image of {guest} does not hold service {subject}.",
        check(
            "{sovereign} exec {guest} -- ls /usr/bin/miniflux",
            "it prints the path",
        ),
        Fix {
            run: "{sovereign} build && {sovereign} down && {sovereign} up",
            automatic: false,
            risk: "all guests of the instance boot again",
        },
    ),
    entry(
        Service,
        "SessionLost",
        Consequence,
        "Nobody can ask for service {subject} of {guest}.",
        STATUS,
        WAIT,
    ),
    entry(
        Service,
        "Launching",
        Passing,
        "Service {subject} of {guest} is being prepared.",
        PROCESSES,
        WAIT,
    ),
    entry(
        Service,
        "Starting",
        Passing,
        "Service {subject} of {guest} was started and has not answered yet.",
        LOG_IN,
        WAIT,
    ),
    entry(
        Service,
        "Recovering",
        Passing,
        "Service {subject} of {guest} replays its log after an unclean end; that may take minutes and must not be cut short.",
        LOG_IN,
        WAIT,
    ),
    entry(
        Service,
        "Restarting",
        Passing,
        "Service {subject} of {guest} restarts to take over its settings.",
        LOG_IN,
        WAIT,
    ),
    entry(
        Service,
        "Stopping",
        Passing,
        "Service {subject} of {guest} is being stopped.",
        STATUS,
        WAIT,
    ),
    entry(
        Service,
        "Stopped",
        Fault,
        "Service {subject} of {guest} was told to stop.",
        EVENTS,
        WAIT,
    ),
    entry(
        Service,
        "Ended",
        Passing,
        "Service {subject} of {guest} ended and is started again after a pause.",
        EVENTS,
        WAIT,
    ),
    entry(
        Service,
        "LaunchFailed",
        Passing,
        "Service {subject} of {guest} could not be started; it is tried again.",
        EVENTS,
        LOGS,
    ),
    entry(
        Service,
        "CrashLoop",
        Fault,
        "Service {subject} of {guest} ended or failed to start five times within a minute and is left alone.",
        EVENTS,
        Fix {
            run: "{sovereign} logs {guest}; {sovereign} down && {sovereign} up",
            automatic: false,
            risk: "it ends again in the same way unless the cause that the console names is gone",
        },
    ),
    entry(
        Service,
        "NotListening",
        Fault,
        "Service {subject} of {guest} was ready, and now nobody listens at its socket.",
        LOG_IN,
        LOGS,
    ),
    entry(
        Service,
        "Silent",
        Fault,
        "Service {subject} of {guest} takes connections and does not answer them: it is stopped, stuck or overloaded.",
        LOG_IN,
        CONTINUE,
    ),
    entry(
        Service,
        "Broken",
        Fault,
        "Service {subject} of {guest} answers something other than it should.",
        LOG_IN,
        LOGS,
    ),
    entry(
        Service,
        "NotApplied",
        Fault,
        "Service {subject} of {guest} runs, but not with its wanted settings.",
        STATUS,
        SETTINGS,
    ),
    entry(
        Service,
        "BadSettings",
        Fault,
        "Service {subject} of {guest} cannot be started with its settings.",
        STATUS,
        SETTINGS,
    ),
    entry(
        Service,
        "OtherVersion",
        Fault,
        "The data disk of {guest} holds the data of another major version of service {subject}; it is not touched.",
        check(
            "{sovereign} exec {guest} -- sh -c 'cat /var/lib/postgresql/*/main/PG_VERSION; ls /usr/lib/postgresql'",
            "both lines name the same version",
        ),
        Fix {
            run: "edit `recipe` of [build] to the version of the data, then: {sovereign} up",
            automatic: false,
            risk: "none for the data; upgrading it is a separate step",
        },
    ),
    entry(
        Service,
        "NoServer",
        Fault,
        "The image of {guest} does not hold service {subject}.",
        check(
            "{sovereign} exec {guest} -- ls /usr/lib/postgresql",
            "it lists a version",
        ),
        Fix {
            run: "{sovereign} build && {sovereign} down && {sovereign} up",
            automatic: false,
            risk: "all guests of the instance boot again",
        },
    ),
    entry(
        Service,
        "NoUser",
        Fault,
        "The image of {guest} lacks the user of service {subject}.",
        check(
            "{sovereign} exec {guest} -- grep postgres /etc/passwd",
            "it prints a line",
        ),
        Fix {
            run: "{sovereign} build && {sovereign} down && {sovereign} up",
            automatic: false,
            risk: "all guests of the instance boot again",
        },
    ),
    entry(
        Service,
        ANY,
        Fault,
        "Service {subject} of {guest} is not known to work ({code}).",
        LOG_IN,
        LOGS,
    ),
    tailscale(
        "NotConfigured",
        "Tailscale is wanted in {guest} and not installed there.",
        LOGS,
    ),
    tailscale("DaemonDown", "tailscaled does not run in {guest}.", RESTART),
    tailscale(
        "NeedsLogin",
        "Tailscale in {guest} is not logged in.",
        Fix {
            run: "{sovereign} exec {guest} -- tailscale login",
            automatic: false,
            risk: "it adds a node to the tailnet: look first whether the old state directory was lost",
        },
    ),
    tailscale(
        "NeedsMachineAuth",
        "Tailscale in {guest} is logged in and waits until an administrator approves the machine.",
        Fix {
            run: "approve the machine in the tailnet's admin console",
            automatic: false,
            risk: "the machine can then be reached by the tailnet's rules",
        },
    ),
    tailscale(
        "Stopped",
        "Tailscale in {guest} is logged in and was stopped.",
        Fix {
            run: "{sovereign} exec {guest} -- tailscale up",
            automatic: false,
            risk: "whoever stopped it may have had a reason",
        },
    ),
    tailscale(
        "InUseOtherUser",
        "Tailscale in {guest} is in use by another user.",
        LOGS,
    ),
    entry(
        Tailscale,
        "NoState",
        Passing,
        "Tailscale in {guest} has not read its state yet.",
        TAILSCALED,
        WAIT,
    ),
    entry(
        Tailscale,
        "Starting",
        Passing,
        "Tailscale in {guest} is logged in and connects.",
        TAILSCALED,
        WAIT,
    ),
    tailscale("Silent", "tailscaled in {guest} does not answer.", RESTART),
    tailscale(
        "Refused",
        "tailscaled in {guest} refuses to tell its status.",
        LOGS,
    ),
    tailscale(
        "Garbled",
        "tailscaled in {guest} answers something that is no status.",
        LOGS,
    ),
    tailscale(
        "UnknownState",
        "tailscaled in {guest} is in a state that is not known here.",
        LOGS,
    ),
    tailscale(
        "Warned",
        "tailscaled in {guest} warns about itself.",
        Fix {
            run: "{sovereign} exec {guest} -- tailscale status",
            automatic: true,
            risk: "none: it prints the warnings with their explanations",
        },
    ),
    entry(
        Tailscale,
        "SessionLost",
        Consequence,
        "Nobody can ask for Tailscale in {guest}.",
        TAILSCALED,
        WAIT,
    ),
    tailscale(ANY, "Tailscale in {guest} is not known to work ({code}).", LOGS),
    entry(
        Forward,
        "PortUnavailable",
        Fault,
        "Forward {subject} to {guest} cannot have its port on this machine.",
        LISTENERS,
        OTHER_PORT,
    ),
    entry(
        Forward,
        "NotListening",
        Consequence,
        "Forward {subject} refuses connections, because {guest} is not ready.",
        STATUS,
        WAIT,
    ),
    entry(
        Forward,
        "NotServed",
        Consequence,
        "The forwards to {guest} are not served, because no host agent runs.",
        STATUS,
        WAIT,
    ),
    entry(
        Forward,
        "Reserved",
        Consequence,
        "Forward {subject} has its port and listens when {guest} is ready.",
        STATUS,
        WAIT,
    ),
    entry(
        Forward,
        "Translating",
        Passing,
        "Forward {subject} has its port, and the kernel is being told to lead it to {guest}.",
        STATUS,
        WAIT,
    ),
    entry(
        Forward,
        "NotTranslated",
        Fault,
        "The kernel of this machine does not lead forward {subject} to {guest}; the guest itself runs.",
        TRANSLATIONS,
        BY_VSOCK,
    ),
    entry(
        Forward,
        "Unconfirmed",
        Passing,
        "The kernel led forward {subject} to {guest}, and whether it still does is not known.",
        TRANSLATIONS,
        BY_VSOCK,
    ),
    entry(
        Forward,
        "PortShared",
        Fault,
        "A program of this machine waits on a port of a forward to {guest} ({subject}) and hears nothing from there, because what comes for it goes to the guest.",
        WAITING,
        OTHER_PORT,
    ),
    entry(
        Forward,
        ANY,
        Fault,
        "Forward {subject} to {guest} is not known to work ({code}).",
        STATUS,
        RESTART,
    ),
];
