//! Tables of nf_tables as chains to follow.

use std::net::IpAddr;

use super::chain::{Action, Chains, Condition, Step};
use super::packet::{Holds, Packet, State};
use crate::family::Family;
use crate::nft::{
    Base, Comparison, CtKey, Expression, Family as Seen, MetaKey, Point, Policy, Register, Table, Verdict,
};

/// Bits of NFT_CT_STATE (nf_conntrack_common.h, IP_CT_* through NF_CT_STATE_BIT).
const ESTABLISHED: u32 = 2;
const NEW: u32 = 8;
/// IPS_DST_NAT.
const TRANSLATED: u32 = 0x20;
/// IPPROTO_TCP.
const TCP: u8 = 6;
/// NFPROTO_*.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// Steps that are no condition and decide nothing.
const GOES_ON: [&str; 8] = [
    "counter", "log", "notrack", "objref", "last", "quota", "tproxy", "dup",
];

/// The chains of a table that forwarded packets of a family meet, one for each base.
pub(super) fn chains(table: &Table, family: Family) -> Vec<Chains> {
    let sees = match table.family {
        Seen::Inet => true,
        Seen::Ip => family == Family::V4,
        Seen::Ip6 => family == Family::V6,
        Seen::Arp | Seen::Bridge | Seen::Netdev => false,
    };
    let steps = || {
        let of = |(name, chain): (&String, &crate::nft::Chain)| {
            (name.clone(), chain.rules.iter().map(step).collect())
        };
        table.chains.iter().map(of).collect()
    };
    let bases = table.chains.iter().filter_map(|(name, chain)| {
        let hook = chain
            .hook
            .as_ref()
            .filter(|hook| hook.point == Point::Forward && sees)?;
        Some(Chains {
            program: "nft".to_owned(),
            table: table.to_string(),
            base: name.clone(),
            drops: hook.policy == Policy::Drop,
            is_nf: true,
            chains: steps(),
        })
    });
    bases.collect()
}

fn step(rule: &crate::nft::Rule) -> Step {
    let decides = |step: &Expression| match step {
        Expression::Verdict(Verdict::Accept) => Some(Action::Accept),
        Expression::Verdict(Verdict::Drop) | Expression::Reject(_) => Some(Action::Drop),
        Expression::Verdict(Verdict::Return) => Some(Action::Return),
        Expression::Verdict(Verdict::Jump(chain)) => Some(Action::Jump(chain.clone())),
        Expression::Unknown { name, .. } if name == "reject" => Some(Action::Drop),
        Expression::Unknown { name, .. } if is_open(name) => Some(Action::Unknown),
        _ => None,
    };
    // A lookup may be a map of verdicts: then nothing follows it.
    let last = rule.expressions.last();
    let maps = matches!(last, Some(Expression::Unknown { name, .. }) if name == "lookup");
    let action = rule.expressions.iter().find_map(decides);
    let action = action.unwrap_or(if maps { Action::Unknown } else { Action::Continue });
    let text = match (&action, rule.comment.as_str()) {
        (_, comment) if !comment.is_empty() => format!("the rule \"{comment}\""),
        (Action::Drop, _) => "a rule that drops or refuses".to_owned(),
        (Action::Unknown, _) => "a rule that cannot be followed".to_owned(),
        _ => "a rule".to_owned(),
    };
    Step {
        holds,
        condition: Condition::Steps(rule.expressions.clone()),
        action,
        text,
    }
}

/// Steps that may decide in ways that are not known: verdicts that are not ours to make, and those of iptables.
fn is_open(name: &str) -> bool {
    [
        "immediate",
        "queue",
        "match",
        "target",
        "compat",
        "synproxy",
        "fwd",
    ]
    .contains(&name)
}

/// What a register holds.
#[derive(Clone)]
enum Loaded {
    /// These bytes.
    Bytes(Vec<u8>),
    /// Bits of four bytes in the machine's order, and which of them are known.
    Bits(u32, u32),
    /// A port or something else of some packets.
    Some,
    /// It cannot be told.
    Unknown,
}

fn holds(condition: &Condition, packet: &Packet) -> Holds {
    let Condition::Steps(steps) = condition else {
        return Holds::Perhaps;
    };
    let mut registers = [Loaded::Unknown, Loaded::Unknown];
    let place = |register: Register| register.number() as usize - 1;
    let mut all = Holds::Yes;
    for step in steps {
        match step {
            Expression::Meta { key, to } => registers[place(*to)] = meta(*key, packet),
            Expression::Payload {
                base,
                offset,
                length,
                to,
            } => {
                registers[place(*to)] = payload(packet, *base, *offset as usize, *length as usize);
            }
            Expression::Ct { key, to } => registers[place(*to)] = connection(*key, packet),
            Expression::DestinationType { to } => {
                registers[place(*to)] = Loaded::Bytes(1u32.to_ne_bytes().to_vec()); // RTN_UNICAST: it is forwarded
            }
            Expression::Mask { register, mask } => masked(&mut registers[place(*register)], mask),
            Expression::Compare { register, how, value } => {
                all = all.and(compared(&registers[place(*register)], *how, value));
            }
            Expression::Unknown { name, .. }
                if name == "lookup" || name == "limit" || name == "connlimit" =>
            {
                all = all.and(Holds::Perhaps);
            }
            Expression::Unknown { name, .. } if GOES_ON.contains(&name.as_str()) || is_open(name) => {}
            Expression::Unknown { .. } => registers = [Loaded::Unknown, Loaded::Unknown],
            Expression::RouteMss { to } | Expression::Data { to, .. } => {
                registers[place(*to)] = Loaded::Unknown
            }
            Expression::ToNetworkOrder { register } | Expression::Bits { register, .. } => {
                registers[place(*register)] = Loaded::Unknown
            }
            Expression::WriteMss { .. }
            | Expression::SetMark { .. }
            | Expression::SetConnectionMark { .. }
            | Expression::Verdict(_)
            | Expression::Nat { .. }
            | Expression::Masquerade
            | Expression::Reject(_) => {}
        }
        if all == Holds::No {
            return Holds::No;
        }
    }
    all
}

fn meta(key: MetaKey, packet: &Packet) -> Loaded {
    let name = |name: &str| {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(16, 0);
        Loaded::Bytes(bytes)
    };
    match key {
        MetaKey::InName => name(&packet.iif),
        MetaKey::OutName => name(&packet.oif),
        MetaKey::Family => Loaded::Bytes(vec![if packet.family == Family::V4 { IPV4 } else { IPV6 }]),
        MetaKey::Transport => Loaded::Bytes(vec![TCP]),
        MetaKey::Mark => Loaded::Unknown,
    }
}

fn connection(key: CtKey, packet: &Packet) -> Loaded {
    match key {
        CtKey::State => Loaded::Bits(
            if packet.state == State::New {
                NEW
            } else {
                ESTABLISHED
            },
            u32::MAX,
        ),
        CtKey::Status => Loaded::Bits(if packet.translated { TRANSLATED } else { 0 }, TRANSLATED),
        CtKey::Direction | CtKey::Mark => Loaded::Unknown,
    }
}

fn payload(packet: &Packet, base: Base, offset: usize, length: usize) -> Loaded {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    // Where source and destination stand in the header, and how long they are.
    let (source, size) = match packet.family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    };
    let (ip, start) = match base {
        Base::Transport => return Loaded::Some,
        Base::Network if offset == source => (packet.from, source),
        Base::Network if offset == source + size => (packet.to, source + size),
        Base::Network | Base::Link => return Loaded::Unknown,
    };
    match octets(ip).get(..length) {
        Some(bytes) if offset == start => Loaded::Bytes(bytes.to_vec()),
        _ => Loaded::Unknown,
    }
}

fn masked(register: &mut Loaded, mask: &[u8]) {
    match register {
        Loaded::Bytes(bytes) if bytes.len() == mask.len() => {
            bytes.iter_mut().zip(mask).for_each(|(byte, mask)| *byte &= mask);
        }
        Loaded::Bits(bits, known) => match <[u8; 4]>::try_from(mask) {
            Ok(mask) => {
                let mask = u32::from_ne_bytes(mask);
                *bits &= mask;
                *known |= !mask; // those are zero now
            }
            Err(_) => *register = Loaded::Unknown,
        },
        Loaded::Bytes(_) => *register = Loaded::Unknown,
        Loaded::Some | Loaded::Unknown => {}
    }
}

fn compared(register: &Loaded, how: Comparison, value: &[u8]) -> Holds {
    let bytes = match register {
        Loaded::Some => return Holds::No, // about some ports: nothing about the others
        Loaded::Unknown => return Holds::Perhaps,
        Loaded::Bits(bits, known) => {
            let Ok(value) = <[u8; 4]>::try_from(value) else {
                return Holds::Perhaps;
            };
            let value = u32::from_ne_bytes(value);
            let same = bits & known == value & known;
            return match (how, same, *known == u32::MAX) {
                (Comparison::Equal, false, _) => Holds::No,
                (Comparison::NotEqual, false, _) => Holds::Yes,
                (Comparison::Equal, true, true) => Holds::Yes,
                (Comparison::NotEqual, true, true) => Holds::No,
                _ => Holds::Perhaps,
            };
        }
        Loaded::Bytes(bytes) => bytes,
    };
    let Some(bytes) = bytes.get(..value.len()) else {
        return Holds::Perhaps; // the kernel compares no more than was loaded
    };
    Holds::of(match how {
        Comparison::Equal => bytes == value,
        Comparison::NotEqual => bytes != value,
        Comparison::AtMost => bytes <= value,
        Comparison::AtLeast => bytes >= value,
    })
}
