//! What a rule does to a packet, step by step; printed as `nft --debug=netlink` prints it.

use std::fmt;
use std::net::IpAddr;

/// A place for 16 bytes between two steps of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// The first.
    One,
    /// The second.
    Two,
}

impl Register {
    /// Its number (NFT_REG_*).
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// The register with a number.
    #[must_use]
    pub fn of(number: u32) -> Option<Self> {
        [Self::One, Self::Two]
            .into_iter()
            .find(|register| register.number() == number)
    }
}

/// One step. Numbers of the kernel that are not ours to use make a step [`Unknown`](Self::Unknown).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Expression {
    /// Loads something that the kernel knows of the packet.
    Meta {
        /// What.
        key: MetaKey,
        /// Where to.
        to: Register,
    },
    /// Loads bytes of the packet.
    Payload {
        /// From which header on.
        base: Base,
        /// The first byte.
        offset: u32,
        /// How many.
        length: u32,
        /// Where to.
        to: Register,
    },
    /// Goes on only if a register compares so.
    Compare {
        /// The register.
        register: Register,
        /// How.
        how: Comparison,
        /// With what.
        value: Vec<u8>,
    },
    /// A register's bytes with a mask; both as long as what was loaded.
    Mask {
        /// From and to it.
        register: Register,
        /// The bits to keep.
        mask: Vec<u8>,
    },
    /// Some bits of a register to others; both values as long as what was loaded, and no bit in both.
    Bits {
        /// From and to it.
        register: Register,
        /// The bits that stay as they are.
        keep: Vec<u8>,
        /// The bits that are set.
        set: Vec<u8>,
    },
    /// Gives the packet a mark, which rules of routing ask for.
    SetMark {
        /// From where.
        from: Register,
    },
    /// Gives the packet's connection a mark.
    SetConnectionMark {
        /// From where.
        from: Register,
    },
    /// Loads something of the connection that the packet belongs to.
    Ct {
        /// What.
        key: CtKey,
        /// Where to.
        to: Register,
    },
    /// Loads the largest segment of TCP on the packet's route, both ways.
    RouteMss {
        /// Where to.
        to: Register,
    },
    /// Turns a register's first two bytes into network order.
    ToNetworkOrder {
        /// From and to it.
        register: Register,
    },
    /// Writes the largest segment into TCP's option, if it is there and larger.
    WriteMss {
        /// From where.
        from: Register,
    },
    /// Loads the type of the destination's address (RTN_*).
    DestinationType {
        /// Where to.
        to: Register,
    },
    /// Loads bytes of our own.
    Data {
        /// Where to.
        to: Register,
        /// What.
        value: Vec<u8>,
    },
    /// Decides, or goes to another chain.
    Verdict(Verdict),
    /// Translates source or destination of the connection.
    Nat {
        /// Which.
        kind: NatKind,
        /// What the address is.
        family: NatFamily,
        /// Where the address stands.
        address: Register,
        /// Where the port stands; without it the port stays.
        port: Option<Register>,
    },
    /// Translates the connection's source to the address of the link that it leaves by.
    Masquerade,
    /// Refuses with an error message.
    Reject(Refusal),
    /// A step that we do not know, or with settings that we do not know.
    Unknown {
        /// Its name.
        name: String,
        /// Its settings, as they came.
        bytes: Vec<u8>,
    },
}

/// What the kernel knows of a packet (NFT_META_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MetaKey {
    /// The packet's mark, four bytes in the machine's order.
    Mark,
    /// The name of the link it came by, 16 bytes.
    InName,
    /// The name of the link it leaves by, 16 bytes.
    OutName,
    /// IPv4 or IPv6, one byte.
    Family,
    /// The transport protocol, one byte.
    Transport,
}

/// What the kernel knows of a connection (NFT_CT_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CtKey {
    /// What the packet is to it, a bit of four bytes in the machine's order.
    State,
    /// With the connection or against it, one byte.
    Direction,
    /// What was done to it, bits of four bytes in the machine's order.
    Status,
    /// The connection's mark, four bytes in the machine's order.
    Mark,
}

/// Headers of a packet (NFT_PAYLOAD_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Base {
    /// Ethernet's.
    Link,
    /// That of IP or ARP.
    Network,
    /// That of TCP, UDP or ICMP.
    Transport,
}

/// Ways to compare, byte by byte from the first (NFT_CMP_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Comparison {
    /// The same.
    Equal,
    /// Not the same.
    NotEqual,
    /// At most.
    AtMost,
    /// At least.
    AtLeast,
}

/// The end of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// This table lets it pass.
    Accept,
    /// It is gone.
    Drop,
    /// Back to the chain that called this one.
    Return,
    /// To another chain, and back after it.
    Jump(String),
}

/// What NAT changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NatKind {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// The addresses of a translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NatFamily {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl NatFamily {
    /// Of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ip } else { Self::Ip6 }
    }
}

/// Refusals: the ICMP message that fits the packet's family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// "Forbidden by an administrator": programs hear "no route to host" or "permission denied" at once.
    Prohibited,
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reg = |register: &Register| register.number();
        match self {
            Self::Meta { key, to } => write!(f, "[ meta load {key} => reg {} ]", reg(to)),
            Self::Payload {
                base,
                offset,
                length,
                to,
            } => write!(
                f,
                "[ payload load {length}b @ {base} header + {offset} => reg {} ]",
                reg(to)
            ),
            Self::Compare { register, how, value } => {
                write!(f, "[ cmp {how} reg {} {}]", reg(register), Words(value))
            }
            Self::Mask { register, mask } => {
                let (register, zeros) = (reg(register), vec![0; mask.len()]);
                write!(
                    f,
                    "[ bitwise reg {register} = ( reg {register} & {}) ^ {}]",
                    Words(mask),
                    Words(&zeros)
                )
            }
            Self::Bits { register, keep, set } => {
                let (register, keep, set) = (reg(register), Words(keep), Words(set));
                write!(
                    f,
                    "[ bitwise reg {register} = ( reg {register} & {keep}) ^ {set}]"
                )
            }
            Self::SetMark { from } => write!(f, "[ meta set mark with reg {} ]", reg(from)),
            Self::SetConnectionMark { from } => write!(f, "[ ct set mark with reg {} ]", reg(from)),
            Self::Ct { key, to } => write!(f, "[ ct load {key} => reg {} ]", reg(to)),
            Self::RouteMss { to } => write!(f, "[ rt load tcpmss => reg {} ]", reg(to)),
            Self::ToNetworkOrder { register } => {
                let register = reg(register);
                write!(f, "[ byteorder reg {register} = hton(reg {register}, 2, 2) ]")
            }
            Self::WriteMss { from } => write!(f, "[ exthdr write tcpopt reg {} => 2b @ 2 + 2 ]", reg(from)),
            Self::DestinationType { to } => write!(f, "[ fib daddr type => reg {} ]", reg(to)),
            Self::Data { to, value } => write!(f, "[ immediate reg {} {}]", reg(to), Words(value)),
            Self::Verdict(verdict) => write!(f, "[ immediate reg 0 {verdict} ]"),
            Self::Nat {
                kind,
                family,
                address,
                port,
            } => {
                write!(f, "[ nat {kind} {family} addr_min reg {} ", reg(address))?;
                if let Some(port) = port {
                    write!(f, "proto_min reg {} flags 0x2 ", reg(port))?;
                }
                f.write_str("]")
            }
            Self::Masquerade => f.write_str("[ masq ]"),
            Self::Reject(Refusal::Prohibited) => f.write_str("[ reject type 2 code 3 ]"),
            Self::Unknown { name, bytes } => {
                write!(f, "[ {} unknown, {} bytes ]", name.escape_debug(), bytes.len())
            }
        }
    }
}

/// Bytes as words of four in a little-endian machine's order, as libnftnl prints them; the last one is filled up.
struct Words<'a>(&'a [u8]);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for word in self.0.chunks(4) {
            f.write_str("0x")?;
            for at in (0..4).rev() {
                write!(f, "{:02x}", word.get(at).copied().unwrap_or_default())?;
            }
            f.write_str(" ")?;
        }
        Ok(())
    }
}

/// How `nft --debug=netlink` calls them.
macro_rules! words {
    ($type:ident: $($variant:ident $word:literal),+) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }
    };
}

words!(MetaKey: Mark "mark", InName "iifname", OutName "oifname", Family "nfproto", Transport "l4proto");
words!(CtKey: State "state", Direction "direction", Status "status", Mark "mark");
words!(Base: Link "link", Network "network", Transport "transport");
words!(Comparison: Equal "eq", NotEqual "neq", AtMost "lte", AtLeast "gte");
words!(NatKind: Source "snat", Destination "dnat");
words!(NatFamily: Ip "ip", Ip6 "ip6");

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump -> {chain}"),
        }
    }
}
