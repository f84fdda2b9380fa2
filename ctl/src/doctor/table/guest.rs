//! What a guest stands on: kernel, clock, disk, loopback, interface.

use sovereign_protocol::condition::Layer::{Clock, Disk, Interface, Kernel, Loopback};

use super::Kind::{Consequence, Fault, Passing};
use super::{ANY, Check, Entry, Fix, LOGS, RESTART, STATUS, WAIT, check, entry};

const OTHER_KERNEL: Fix = Fix {
    run: "{sovereign} build && {sovereign} down && {sovereign} up",
    automatic: false,
    risk: "all guests of the instance boot again, with the kernel of the lock file",
};
const DATES: Check = check(
    "{sovereign} exec {guest} -- date -u +%s && date -u +%s",
    "both numbers are the same within a second",
);
const CLOCK_RESTART: Fix = Fix {
    run: "{sovereign} down && {sovereign} up",
    automatic: false,
    risk: "all guests of the instance boot again, with the host's time; times that services wrote meanwhile stay as they are",
};
const SIGNATURE: Check = check(
    "blkid -p {disk}",
    "it names an ext4 file system with the label sovereign-data",
);
const SET_ASIDE: Fix = Fix {
    run: "{sovereign} down && mv {disk} {disk}.aside && {sovereign} up",
    automatic: false,
    risk: "the guest starts with an empty data disk; what was there stays in the file that is set aside",
};
const REPAIR: Fix = Fix {
    run: "{sovereign} down && cp --sparse=always {disk} {disk}.before && e2fsck -f -y {disk}; {sovereign} up",
    automatic: false,
    risk: "e2fsck drops what it cannot repair; the copy keeps the disk as it was",
};
const LARGER: Fix = Fix {
    run: "edit `data` of [guest.{guest}] in the configuration, then: {sovereign} down && {sovereign} up",
    automatic: false,
    risk: "the guest boots again; a data disk only ever grows",
};
const MOUNTED: Check = check(
    "{sovereign} exec {guest} -- busybox grep /run/sovereign/data /proc/mounts",
    "it prints /run/sovereign/data as ext4 and rw",
);
const SPACE: Check = check(
    "{sovereign} exec {guest} -- busybox df -m /run/sovereign/data",
    "more than 16 MiB are available",
);
const LO: Check = check(
    "{sovereign} exec {guest} -- busybox ping -c 1 -W 2 127.0.0.1",
    "the packet comes back",
);
/// The link going down and up makes the kernel's local routes anew, which an address alone does not.
const LO_UP: Fix = Fix {
    run: "{sovereign} exec {guest} -- sh -c 'busybox ip addr replace 127.0.0.1/8 dev lo; busybox ip link set lo down; busybox ip link set lo up'",
    automatic: true,
    risk: "none: it is how the loopback must be; if it does not help, a rule or packet filter in the guest drops it",
};
const ADDRESSES: Check = check(
    "{sovereign} exec {guest} -- sh -c 'busybox ip addr; busybox ip route'",
    "the wanted address and default route are there",
);
const WRITERS: Fix = Fix {
    run: "{sovereign} exec {guest} -- busybox ps",
    automatic: true,
    risk: "none: it lists the processes, one of which changes the network",
};

pub(super) const ENTRIES: &[Entry] = &[
    entry(
        Kernel,
        "Lacks",
        Fault,
        "The kernel of {guest} lacks something that a service needs.",
        check(
            "{sovereign} exec {guest} -- uname -r",
            "it is another kernel than the one that was built",
        ),
        OTHER_KERNEL,
    ),
    entry(
        Kernel,
        ANY,
        Fault,
        "The kernel of {guest} is not known to be what its services need ({code}).",
        STATUS,
        LOGS,
    ),
    entry(
        Clock,
        "Off",
        Fault,
        "The clock of {guest} is off by more than is steered away; its agent steps it, but never back while services run.",
        DATES,
        CLOCK_RESTART,
    ),
    entry(
        Clock,
        "Ahead",
        Fault,
        "The clock of {guest} is ahead of the host, and is not set back while services run.",
        DATES,
        CLOCK_RESTART,
    ),
    entry(
        Clock,
        "NotAdjusted",
        Fault,
        "The clock of {guest} cannot be set by its agent.",
        DATES,
        LOGS,
    ),
    entry(
        Clock,
        "NotMeasured",
        Passing,
        "The clock of {guest} was not measured yet.",
        DATES,
        WAIT,
    ),
    entry(
        Clock,
        ANY,
        Fault,
        "The clock of {guest} is not known to be right ({code}).",
        DATES,
        LOGS,
    ),
    entry(
        Disk,
        "Missing",
        Fault,
        "Guest {guest} does not see its data disk.",
        check(
            "{sovereign} exec {guest} -- sh -c 'cat /sys/block/*/serial'",
            "one line says data",
        ),
        RESTART,
    ),
    entry(
        Disk,
        "Unreadable",
        Fault,
        "The data disk of {guest} cannot be read.",
        MOUNTED,
        RESTART,
    ),
    entry(
        Disk,
        "Foreign",
        Fault,
        "The data disk of {guest} holds something that is not ours; it is never formatted, and nothing is started on it.",
        SIGNATURE,
        SET_ASIDE,
    ),
    entry(
        Disk,
        "Blank",
        Fault,
        "The data disk of {guest} is blank, and this boot may not format it.",
        SIGNATURE,
        RESTART,
    ),
    entry(
        Disk,
        "TooSmall",
        Fault,
        "The data disk of {guest} is too small for a file system.",
        check("ls -ls {disk}", "it has more than 2 MiB"),
        LARGER,
    ),
    entry(
        Disk,
        "FormatFailed",
        Fault,
        "The blank data disk of {guest} could not be formatted.",
        check(
            "df -h {state}",
            "the host has room, and `sovereign logs` shows no error of mkfs.ext4",
        ),
        LOGS,
    ),
    entry(
        Disk,
        "Damaged",
        Fault,
        "The file system on the data disk of {guest} is damaged beyond what is repaired without asking.",
        check(
            "e2fsck -f -n {disk}",
            "it ends without a complaint (the guest does not have the disk mounted)",
        ),
        REPAIR,
    ),
    entry(
        Disk,
        "MountFailed",
        Fault,
        "The data disk of {guest} is good and cannot be mounted.",
        MOUNTED,
        LOGS,
    ),
    entry(
        Disk,
        "NotMounted",
        Fault,
        "Something else is mounted where the data disk of {guest} must be.",
        MOUNTED,
        RESTART,
    ),
    entry(
        Disk,
        "ReadOnly",
        Fault,
        "The kernel of {guest} made the data disk read-only, as it does after an error.",
        MOUNTED,
        RESTART,
    ),
    entry(
        Disk,
        "Full",
        Fault,
        "The data disk of {guest} is full.",
        SPACE,
        LARGER,
    ),
    entry(
        Disk,
        "NoFacts",
        Fault,
        "The init of {guest} left no word about the data disk.",
        MOUNTED,
        RESTART,
    ),
    entry(
        Disk,
        ANY,
        Fault,
        "The data disk of {guest} is not known to be good ({code}).",
        MOUNTED,
        LOGS,
    ),
    entry(
        Loopback,
        "Down",
        Fault,
        "The loopback of {guest} does not answer, and raising it does not help: everything that reaches a service through 127.0.0.1 or the guest's own address times out, Tailscale's serve too.",
        LO,
        LO_UP,
    ),
    entry(
        Loopback,
        "AddressMissing",
        Fault,
        "The loopback of {guest} lacks its address and does not get it back.",
        LO,
        LO_UP,
    ),
    entry(
        Loopback,
        "NoAnswer",
        Fault,
        "The loopback of {guest} is up with its address, and a dial of 127.0.0.1 still does not get through.",
        LO,
        LO_UP,
    ),
    entry(
        Loopback,
        "Contested",
        Fault,
        "Something in {guest} changes the loopback again and again; it is repaired more slowly now.",
        LO,
        WRITERS,
    ),
    entry(
        Loopback,
        ANY,
        Fault,
        "The loopback of {guest} is not known to answer ({code}).",
        LO,
        LO_UP,
    ),
    entry(
        Interface,
        "NoDevice",
        Fault,
        "Guest {guest} has no network interface of the virtual machine.",
        check(
            "{sovereign} exec {guest} -- busybox ip link",
            "an interface beside lo is listed",
        ),
        RESTART,
    ),
    entry(
        Interface,
        "Down",
        Fault,
        "The network interface of {guest} is down and does not come up.",
        ADDRESSES,
        LOGS,
    ),
    entry(
        Interface,
        "NoCarrier",
        Fault,
        "The network interface of {guest} is up and nobody is at its other end, which is the host's tap.",
        check("{sovereign} status", "layer tap is ✓"),
        RESTART,
    ),
    entry(
        Interface,
        "AddressMissing",
        Fault,
        "The network interface of {guest} lacks an address and does not get it back.",
        ADDRESSES,
        LOGS,
    ),
    entry(
        Interface,
        "AddressConflict",
        Fault,
        "Somebody else on the link has the address of {guest}.",
        ADDRESSES,
        Fix {
            run: "edit the address of [guest.{guest}] in the configuration, then: {sovereign} up",
            automatic: false,
            risk: "connections to the old address end",
        },
    ),
    entry(
        Interface,
        "AddressTentative",
        Passing,
        "An address of {guest} is still being checked for duplicates.",
        ADDRESSES,
        WAIT,
    ),
    entry(
        Interface,
        "RouteMissing",
        Fault,
        "Guest {guest} has no default route and does not get it back.",
        ADDRESSES,
        LOGS,
    ),
    entry(
        Interface,
        "ResolverMissing",
        Fault,
        "The resolver of {guest} is not as wanted and cannot be written.",
        check(
            "{sovereign} exec {guest} -- cat /etc/resolv.conf",
            "it names the wanted servers",
        ),
        LOGS,
    ),
    entry(
        Interface,
        "OtherMtu",
        Fault,
        "The network interface of {guest} has another MTU than the wanted one.",
        ADDRESSES,
        LOGS,
    ),
    entry(
        Interface,
        "Outdated",
        Fault,
        "The network interface of {guest} has an address or route of before that does not go away.",
        ADDRESSES,
        LOGS,
    ),
    entry(
        Interface,
        "Contested",
        Fault,
        "Something in {guest} changes its network again and again; it is repaired more slowly now.",
        ADDRESSES,
        WRITERS,
    ),
    entry(
        Interface,
        ANY,
        Fault,
        "The network interface of {guest} is not known to be as wanted ({code}).",
        ADDRESSES,
        LOGS,
    ),
    // What every layer of a guest may say.
    entry(
        Kernel,
        "SessionLost",
        Consequence,
        "Nobody can ask for the kernel of {guest}.",
        STATUS,
        WAIT,
    ),
    entry(
        Clock,
        "SessionLost",
        Consequence,
        "Nobody can ask for the clock of {guest}.",
        STATUS,
        WAIT,
    ),
    entry(
        Disk,
        "SessionLost",
        Consequence,
        "Nobody can ask for the data disk of {guest}.",
        STATUS,
        WAIT,
    ),
    entry(
        Loopback,
        "SessionLost",
        Consequence,
        "Nobody can ask for the loopback of {guest}.",
        STATUS,
        WAIT,
    ),
    entry(
        Interface,
        "SessionLost",
        Consequence,
        "Nobody can ask for the network interface of {guest}.",
        STATUS,
        WAIT,
    ),
];
