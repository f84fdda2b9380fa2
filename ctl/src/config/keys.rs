//! Every key of the file, once: its form and limits, its default, what it is for, and how `init` shows it. Pure data.
//!
//! Validation, the file that `init` writes and docs/configuration.md are all made from this; a test compares it with
//! the keys that the file may hold.

use std::ops::RangeInclusive;

use sovereign_protocol::limits::{
    DATA_MIB, MEMORY_MIB, NAME_SERVERS, SEARCH, SERVICE_CPU_PERCENT, SERVICE_MEMORY_MIB, SERVICE_TASKS, VCPUS,
};

use super::RECIPE;

/// What a value looks like.
#[derive(Debug)]
pub(super) enum Form {
    /// A number and a unit, within limits in MiB.
    Size(RangeInclusive<u32>),
    /// A whole number.
    Count(RangeInclusive<u32>),
    /// Of one CPU, such as `"150%"`.
    Percent(RangeInclusive<u32>),
    /// One of these words.
    Choice(&'static [&'static str]),
    /// `true` or `false`.
    Flag,
    /// Anything that these words describe.
    Words(&'static str),
}

/// What holds when a key is not there.
#[derive(Debug)]
pub(super) enum Absent {
    /// This value, as text.
    Value(&'static str),
    /// What these words say.
    Words(&'static str),
    /// It must be there.
    Needed,
}

/// How `init` shows it.
#[derive(Debug)]
pub(super) enum Shown {
    /// As this value.
    Set(&'static str),
    /// As a comment with this value.
    Example(&'static str),
    /// As a table with these lines.
    Table(&'static [&'static str]),
    /// As the comment of a table without keys.
    ExampleTable,
    /// Where the example of a second guest needs it.
    Elsewhere,
}

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// Where it stands, with `NAME` and `SERVICE` for names, and `[]` for one of several.
    pub(super) path: &'static str,
    pub(super) form: Form,
    pub(super) absent: Absent,
    /// What it is for, in a few words.
    pub(super) about: &'static str,
    pub(super) shown: Shown,
}

impl Key {
    /// What is accepted, in words.
    pub(super) fn accepted(&self) -> String {
        match &self.form {
            Form::Size(range) => {
                let (least, most) = (size(*range.start()), size(*range.end()));
                format!("{least} to {most}, as a number and MiB, GiB or TiB, such as \"256MiB\"")
            }
            Form::Count(range) => format!("{} to {}", range.start(), range.end()),
            Form::Percent(range) => format!(
                "\"{}%\" to \"{}%\", such as \"150%\": one CPU and a half",
                range.start(),
                range.end()
            ),
            Form::Choice(words) => {
                let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
                match quoted.split_last() {
                    Some((last, [])) => last.clone(),
                    Some((last, first)) => format!("{} or {last}", first.join(", ")),
                    None => String::new(),
                }
            }
            Form::Flag => "true or false".to_owned(),
            Form::Words(words) => (*words).to_owned(),
        }
    }

    /// The default as text; nothing for a key that has none.
    pub(super) fn default(&self) -> &'static str {
        match self.absent {
            Absent::Value(text) => text,
            Absent::Words(_) | Absent::Needed => "",
        }
    }
}

/// A size with the largest unit that fits.
pub(super) fn size(mib: u32) -> String {
    match mib {
        mib if mib % (1 << 20) == 0 && mib > 0 => format!("{} TiB", mib >> 20),
        mib if mib % (1 << 10) == 0 && mib > 0 => format!("{} GiB", mib >> 10),
        mib => format!("{mib} MiB"),
    }
}

const PORTS: RangeInclusive<u32> = 1..=65_535;
/// From what IPv6 needs to what a guest's card has.
const CARD_MTU: RangeInclusive<u32> = 1280..=1500;
/// The words for a key that stands for nothing when it is not there.
pub(super) const NOTHING: &str = "none";
const NONE: Absent = Absent::Words(NOTHING);

pub(super) const MIRROR: Key = Key {
    path: "build.mirror",
    form: Form::Words("an `http://` address, such as \"http://host/debian\""),
    absent: Absent::Words("what apt or debootstrap uses here"),
    about: "a Debian archive, checked by signature",
    shown: Shown::Example("\"http://host/debian\""),
};
pub(super) const SNAPSHOT: Key = Key {
    path: "build.snapshot",
    form: Form::Words("an `http://` address, such as \"http://host\""),
    absent: NONE,
    about: "a snapshot service, asked by hash for packages that the mirror dropped",
    shown: Shown::Example("\"http://host\""),
};
pub(super) const IMAGE: Key = Key {
    path: "build.recipe",
    form: Form::Choice(&[RECIPE]),
    absent: Absent::Value(RECIPE),
    about: "what the image of a guest with PostgreSQL holds; one with Miniflux boots `miniflux`",
    shown: Shown::Example("\"postgresql-17\""),
};
pub(super) const NAMESPACE: Key = Key {
    path: "network.namespace",
    form: Form::Choice(&["auto", "private", "host", "none"]),
    absent: Absent::Value("auto"),
    about: "private: a namespace of our own; host: the machine's; none: vsock only; auto: private or none",
    shown: Shown::Example("\"auto\""),
};
pub(super) const HOST_ADDRESS: Key = Key {
    path: "network.address",
    form: Form::Words(
        "an address with its prefix, such as \"192.168.100.1/24\", or a list with one of each family, such as [\"192.168.100.1/24\", \"fd00:64::1/64\"]",
    ),
    absent: Absent::Value("192.168.100.1/24"),
    about: "this machine's address on the guests' bridge",
    shown: Shown::Example("\"192.168.100.1/24\""),
};
pub(super) const UPLINK: Key = Key {
    path: "network.uplink",
    form: Form::Words(
        "\"auto\" for the machine's own way (in a private namespace \"pasta\", which is the same), \"none\", or in namespace host names of links such as [\"wlan0\", \"rmnet1\"], of which the first with a default route counts",
    ),
    absent: Absent::Words("auto in namespace host, else none"),
    about: "how guests leave (private: by package passt)",
    shown: Shown::Example("\"none\""),
};
pub(super) const VPN: Key = Key {
    path: "network.vpn",
    form: Form::Choice(&["follow", "block", "bypass"]),
    absent: Absent::Value("follow"),
    about: "what guests do while a VPN of the phone (Android) is up",
    shown: Shown::Example("\"follow\""),
};
pub(super) const NETWORK_DNS: Key = Key {
    path: "network.dns",
    form: Form::Words("addresses, such as [\"192.168.100.1\"]"),
    absent: Absent::Words("this machine's own"),
    about: "name servers of guests that name none, at most 3",
    shown: Shown::Example("[\"192.168.100.1\"]"),
};
pub(super) const SEARCH_LIST: Key = Key {
    path: "network.search",
    form: Form::Words("names of domains, such as [\"home.arpa\"]"),
    absent: Absent::Words("this machine's own"),
    about: "domains for names without a dot, at most 6",
    shown: Shown::Example("[\"home.arpa\"]"),
};
const _: () = assert!(SEARCH == 6, "SEARCH_LIST says how many");
pub(super) const NETWORK_MTU: Key = Key {
    path: "network.mtu",
    form: Form::Count(CARD_MTU),
    absent: Absent::Words("what fits through the way out"),
    about: "bytes of a guest's largest packet",
    shown: Shown::Example("1400"),
};
pub(super) const ISOLATED: Key = Key {
    path: "network.isolated",
    form: Form::Flag,
    absent: Absent::Value("false"),
    about: "guests reach this machine only, not each other",
    shown: Shown::Example("false"),
};
pub(super) const MEMORY: Key = Key {
    path: "guest.NAME.memory",
    form: Form::Size(MEMORY_MIB),
    absent: Absent::Value("256MiB"),
    about: "memory of the VM; changes at its next boot",
    shown: Shown::Set("\"256MiB\""),
};
pub(super) const CPUS: Key = Key {
    path: "guest.NAME.vcpus",
    form: Form::Count(VCPUS),
    absent: Absent::Value("1"),
    about: "virtual CPUs; change at its next boot",
    shown: Shown::Set("1"),
};
pub(super) const DATA: Key = Key {
    path: "guest.NAME.data",
    form: Form::Size(DATA_MIB),
    absent: Absent::Value("2GiB"),
    about: "the data disk, a sparse file: it takes the space that is used",
    shown: Shown::Set("\"2GiB\""),
};
pub(super) const ADDRESS: Key = Key {
    path: "guest.NAME.address",
    form: Form::Words("an address in the network's subnet, or a list with one of each family"),
    absent: Absent::Words("one of each of the network's families, by its name"),
    about: "its own address",
    shown: Shown::Example("\"192.168.100.2\""),
};
pub(super) const DNS: Key = Key {
    path: "guest.NAME.dns",
    form: Form::Words("addresses, such as [\"192.168.100.1\"]"),
    absent: NONE,
    about: "its name servers in the place of network.dns, at most 3",
    shown: Shown::Example("[\"192.168.100.1\"]"),
};
const _: () = assert!(NAME_SERVERS == 3, "DNS says how many");
pub(super) const RESTART: Key = Key {
    path: "guest.NAME.restart",
    form: Form::Choice(&["on-failure", "always", "never"]),
    absent: Absent::Value("on-failure"),
    about: "when it boots again by itself; always: also after it powered itself off",
    shown: Shown::Example("\"on-failure\""),
};
pub(super) const RESTART_WEDGED: Key = Key {
    path: "guest.NAME.restart_wedged",
    form: Form::Flag,
    absent: Absent::Value("false"),
    about: "end it when VMM or agent are silent for 30 s, at most 3 times an hour",
    shown: Shown::Example("false"),
};
pub(super) const KIND: Key = Key {
    path: "guest.NAME.service.SERVICE.kind",
    form: Form::Choice(&["postgres", "miniflux"]),
    absent: Absent::Needed,
    about: "what it is, which also says what image the guest boots; a guest has one service",
    shown: Shown::Set("\"postgres\""),
};
pub(super) const PORT: Key = Key {
    path: "guest.NAME.service.SERVICE.port",
    form: Form::Count(PORTS),
    absent: Absent::Words("5432 for postgres, 8080 for miniflux"),
    about: "its port inside the guest",
    shown: Shown::Set("5432"),
};
pub(super) const REQUIRES: Key = Key {
    path: "guest.NAME.service.SERVICE.requires",
    form: Form::Words("GUEST/SERVICE, such as \"sql/postgres\""),
    absent: Absent::Words("none; miniflux needs one"),
    about: "a PostgreSQL of another guest: role and database are made there; it starts when that is ready",
    shown: Shown::Elsewhere,
};
pub(super) const LIMIT_MEMORY: Key = Key {
    path: "guest.NAME.service.SERVICE.limits.memory",
    form: Form::Size(SERVICE_MEMORY_MIB),
    absent: NONE,
    about: "page cache included; over it the guest's kernel reclaims, then kills",
    shown: Shown::Example("\"192MiB\""),
};
pub(super) const LIMIT_CPU: Key = Key {
    path: "guest.NAME.service.SERVICE.limits.cpu",
    form: Form::Percent(SERVICE_CPU_PERCENT),
    absent: NONE,
    about: "processor time",
    shown: Shown::Example("\"150%\""),
};
pub(super) const LIMIT_TASKS: Key = Key {
    path: "guest.NAME.service.SERVICE.limits.tasks",
    form: Form::Count(SERVICE_TASKS),
    absent: NONE,
    about: "processes and threads",
    shown: Shown::Example("256"),
};
pub(super) const SETTINGS: Key = Key {
    path: "guest.NAME.service.SERVICE.settings",
    form: Form::Words("text of one line, numbers, true or false; see below for what the agent sets itself"),
    absent: NONE,
    about: "lines of postgresql.conf",
    shown: Shown::Table(&["# work_mem = \"8MB\"", "# log_min_duration_statement = 250"]),
};
pub(super) const TAILSCALE: Key = Key {
    path: "guest.NAME.tailscale",
    form: Form::Words("an empty table"),
    absent: Absent::Words("not there"),
    about: "watch tailscaled in the guest; nobody waits for it; `postgresql-17` has none yet",
    shown: Shown::ExampleTable,
};
pub(super) const FORWARD_NAME: Key = Key {
    path: "guest.NAME.forward[].name",
    form: Form::Words("a name that no other forward of the guest has"),
    absent: Absent::Needed,
    about: "its name, and that of its service unless `service` says another",
    shown: Shown::Set("\"postgres\""),
};
pub(super) const FORWARD_SERVICE: Key = Key {
    path: "guest.NAME.forward[].service",
    form: Form::Words("a service of the guest"),
    absent: Absent::Words("the forward's own name"),
    about: "the service that must be ready",
    shown: Shown::Example("\"postgres\""),
};
pub(super) const FORWARD_LISTEN: Key = Key {
    path: "guest.NAME.forward[].listen",
    form: Form::Words(
        "an address and a port, such as \"127.0.0.1:15432\", or ports such as \"0.0.0.0:5000-5010\" (via kernel)",
    ),
    absent: Absent::Needed,
    about: "where this machine listens; each only once",
    shown: Shown::Set("\"127.0.0.1:15432\""),
};
pub(super) const FORWARD_PORT: Key = Key {
    path: "guest.NAME.forward[].port",
    form: Form::Count(PORTS),
    absent: Absent::Words("the service's"),
    about: "the service's port in the guest, if you like to see it here",
    shown: Shown::Set("5432"),
};
pub(super) const FORWARD_VIA: Key = Key {
    path: "guest.NAME.forward[].via",
    form: Form::Choice(&["vsock", "kernel"]),
    absent: Absent::Value("vsock"),
    about: "kernel: packets are translated, for UDP, ranges and other machines; needs namespace host",
    shown: Shown::Example("\"vsock\""),
};
pub(super) const FORWARD_PROTOCOL: Key = Key {
    path: "guest.NAME.forward[].protocol",
    form: Form::Choice(&["tcp", "udp"]),
    absent: Absent::Value("tcp"),
    about: "udp needs `via = \"kernel\"`",
    shown: Shown::Example("\"tcp\""),
};
/// All keys, in the order of the file.
pub(super) const ALL: &[&Key] = &[
    &MIRROR,
    &SNAPSHOT,
    &IMAGE,
    &NAMESPACE,
    &HOST_ADDRESS,
    &UPLINK,
    &VPN,
    &NETWORK_DNS,
    &SEARCH_LIST,
    &NETWORK_MTU,
    &ISOLATED,
    &MEMORY,
    &CPUS,
    &DATA,
    &ADDRESS,
    &DNS,
    &RESTART,
    &RESTART_WEDGED,
    &KIND,
    &PORT,
    &REQUIRES,
    &LIMIT_MEMORY,
    &LIMIT_CPU,
    &LIMIT_TASKS,
    &SETTINGS,
    &TAILSCALE,
    &FORWARD_NAME,
    &FORWARD_SERVICE,
    &FORWARD_LISTEN,
    &FORWARD_PORT,
    &FORWARD_VIA,
    &FORWARD_PROTOCOL,
];
