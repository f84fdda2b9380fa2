//! The steps of a rule as nf_tables' attributes, and back. Pure. Numbers: linux/netfilter/nf_tables.h.

use sovereign_reconcile::nft::{
    Base, Comparison, CtKey, Expression, MetaKey, NatFamily, NatKind, Refusal, Register, Verdict,
};

use super::attributes::{Fields, Malformed, Writer, text};

const LIST_ELEMENT: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
/// NFT_REG_VERDICT.
const VERDICT_REGISTER: u32 = 0;
/// NFT_RT_TCPMSS.
const TCP_MSS: u32 = 3;
/// NFT_BYTEORDER_HTON.
const HOST_TO_NETWORK: u32 = 1;
/// NFT_EXTHDR_OP_TCPOPT, and TCP's option 2: two bytes from its third on.
const TCP_OPTION: u32 = 1;
const MAXSEG: (u8, u32, u32) = (2, 2, 2);
/// NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR.
const ADDRESS_TYPE: u32 = 3;
const OF_DESTINATION: u32 = 2;
/// NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_ICMPX_ADMIN_PROHIBITED.
const ICMPX: u32 = 2;
const PROHIBITED: u8 = 3;
/// NF_NAT_RANGE_MAP_IPS and NF_NAT_RANGE_PROTO_SPECIFIED: the kernel sets them for what it was given.
const MAP_IPS: u32 = 1;
const PROTO_SPECIFIED: u32 = 2;

/// Appends a step.
pub(super) fn write(writer: &mut Writer, expression: &Expression) {
    writer.nest(LIST_ELEMENT, |writer| {
        writer.text(NAME, name(expression));
        if let Expression::Unknown { bytes, .. } = expression {
            return writer.bytes(DATA | 0x8000, bytes);
        }
        writer.nest(DATA, |writer| settings(writer, expression));
    });
}

fn name(expression: &Expression) -> &str {
    match expression {
        Expression::Meta { .. } | Expression::SetMark { .. } => "meta",
        Expression::Payload { .. } => "payload",
        Expression::Compare { .. } => "cmp",
        Expression::Mask { .. } | Expression::Bits { .. } => "bitwise",
        Expression::Ct { .. } | Expression::SetConnectionMark { .. } => "ct",
        Expression::RouteMss { .. } => "rt",
        Expression::ToNetworkOrder { .. } => "byteorder",
        Expression::WriteMss { .. } => "exthdr",
        Expression::DestinationType { .. } => "fib",
        Expression::Data { .. } | Expression::Verdict(_) => "immediate",
        Expression::Nat { .. } => "nat",
        Expression::Masquerade => "masq",
        Expression::Reject(_) => "reject",
        Expression::Unknown { name, .. } => name,
    }
}

/// In the order in which libnftnl writes them.
fn settings(writer: &mut Writer, expression: &Expression) {
    let mut numbers = |pairs: &[(u16, u32)]| pairs.iter().for_each(|(kind, value)| writer.u32(*kind, *value));
    match expression {
        Expression::Meta { key, to } => numbers(&[(2, meta_number(*key)), (1, to.number())]),
        Expression::Payload {
            base,
            offset,
            length,
            to,
        } => {
            numbers(&[
                (1, to.number()),
                (2, base_number(*base)),
                (3, *offset),
                (4, *length),
            ]);
        }
        Expression::Compare { register, how, value } => {
            numbers(&[(1, register.number()), (2, comparison_number(*how))]);
            writer.nest(3, |writer| writer.bytes(VALUE, value));
        }
        Expression::SetMark { from } => numbers(&[(2, meta_number(MetaKey::Mark)), (3, from.number())]),
        Expression::SetConnectionMark { from } => {
            numbers(&[(2, ct_number(CtKey::Mark)), (4, from.number())]);
        }
        Expression::Mask { register, mask } => bitwise(writer, *register, mask, &vec![0; mask.len()]),
        Expression::Bits { register, keep, set } => bitwise(writer, *register, keep, set),
        Expression::Ct { key, to } => numbers(&[(2, ct_number(*key)), (1, to.number())]),
        Expression::RouteMss { to } => numbers(&[(2, TCP_MSS), (1, to.number())]),
        Expression::ToNetworkOrder { register } => {
            let register = register.number();
            numbers(&[(1, register), (2, register), (3, HOST_TO_NETWORK), (4, 2), (5, 2)]);
        }
        Expression::WriteMss { from } => {
            let (option, offset, length) = MAXSEG;
            writer.u32(7, from.number());
            writer.bytes(2, &[option]);
            for (kind, value) in [(3, offset), (4, length), (6, TCP_OPTION)] {
                writer.u32(kind, value);
            }
        }
        Expression::DestinationType { to } => {
            numbers(&[(3, OF_DESTINATION), (2, ADDRESS_TYPE), (1, to.number())]);
        }
        Expression::Data { to, value } => {
            writer.u32(1, to.number());
            writer.nest(DATA, |writer| writer.bytes(VALUE, value));
        }
        Expression::Verdict(verdict) => {
            writer.u32(1, VERDICT_REGISTER);
            writer.nest(DATA, |writer| {
                writer.nest(VERDICT, |writer| write_verdict(writer, verdict))
            });
        }
        Expression::Nat {
            kind,
            family,
            address,
            port,
        } => {
            numbers(&[
                (1, nat_number(*kind)),
                (2, family_number(*family)),
                (3, address.number()),
            ]);
            if let Some(port) = port {
                writer.u32(5, port.number());
                writer.u32(7, PROTO_SPECIFIED);
            }
        }
        Expression::Reject(Refusal::Prohibited) => {
            writer.u32(1, ICMPX);
            writer.bytes(2, &[PROHIBITED]);
        }
        Expression::Masquerade | Expression::Unknown { .. } => {}
    }
}

fn bitwise(writer: &mut Writer, register: Register, mask: &[u8], xor: &[u8]) {
    let (register, length) = (register.number(), mask.len() as u32);
    for (kind, value) in [(1, register), (2, register), (3, length)] {
        writer.u32(kind, value);
    }
    writer.nest(4, |writer| writer.bytes(VALUE, mask));
    writer.nest(5, |writer| writer.bytes(VALUE, xor));
}

/// The steps in a rule's list; each that is not understood is kept as it is.
///
/// # Errors
/// [`Malformed`] when it is no list.
pub(super) fn read_all(list: &[u8]) -> Result<Vec<Expression>, Malformed> {
    let elements = super::attributes::attributes(list);
    elements
        .map(|element| {
            let (kind, element) = element?;
            if kind != LIST_ELEMENT {
                return Err(Malformed);
            }
            let mut fields = Fields::<3>::read(element)?;
            let name = fields.bytes(NAME).ok_or(Malformed)?;
            Ok(read(&text(name), fields.bytes(DATA).unwrap_or_default()))
        })
        .collect()
}

fn read(name: &str, data: &[u8]) -> Expression {
    known(name, data).unwrap_or_else(|| Expression::Unknown {
        name: name.to_owned(),
        bytes: data.to_vec(),
    })
}

/// `None` for every setting that none of our own steps has.
fn known(name: &str, data: &[u8]) -> Option<Expression> {
    let mut fields = Fields::<9>::read(data).ok()?;
    let expression = match name {
        "meta" => match (meta_of(fields.u32(2)?)?, fields.u32(3)) {
            (MetaKey::Mark, Some(from)) => Expression::SetMark {
                from: Register::of(from)?,
            },
            (_, Some(_)) => return None,
            (key, None) => Expression::Meta {
                key,
                to: Register::of(fields.u32(1)?)?,
            },
        },
        "payload" => Expression::Payload {
            base: base_of(fields.u32(2)?)?,
            offset: fields.u32(3)?,
            length: fields.u32(4)?,
            to: Register::of(fields.u32(1)?)?,
        },
        "cmp" => Expression::Compare {
            register: Register::of(fields.u32(1)?)?,
            how: comparison_of(fields.u32(2)?)?,
            value: value(fields.bytes(3)?)?,
        },
        "bitwise" => bits(&mut fields)?,
        "ct" => match (ct_of(fields.u32(2)?)?, fields.u32(4)) {
            (CtKey::Mark, Some(from)) => Expression::SetConnectionMark {
                from: Register::of(from)?,
            },
            (_, Some(_)) => return None,
            (key, None) => Expression::Ct {
                key,
                to: Register::of(fields.u32(1)?)?,
            },
        },
        "rt" => {
            let to = Register::of(fields.u32(1)?)?;
            (fields.u32(2)? == TCP_MSS).then_some(Expression::RouteMss { to })?
        }
        "byteorder" => {
            let (register, to) = (fields.u32(1)?, fields.u32(2)?);
            let is_ours = [fields.u32(3)?, fields.u32(4)?, fields.u32(5)?] == [HOST_TO_NETWORK, 2, 2];
            let register = Register::of(register)?;
            (is_ours && to == register.number()).then_some(Expression::ToNetworkOrder { register })?
        }
        "exthdr" => {
            let from = Register::of(fields.u32(7)?)?;
            let what = (fields.u8(2)?, fields.u32(3)?, fields.u32(4)?);
            let flags = fields.u32(5).unwrap_or_default();
            let is_ours = what == MAXSEG && (fields.u32(6)?, flags) == (TCP_OPTION, 0);
            is_ours.then_some(Expression::WriteMss { from })?
        }
        "fib" => {
            let to = Register::of(fields.u32(1)?)?;
            let is_ours = (fields.u32(2)?, fields.u32(3)?) == (ADDRESS_TYPE, OF_DESTINATION);
            is_ours.then_some(Expression::DestinationType { to })?
        }
        "immediate" => immediate(&mut fields)?,
        "nat" => nat(&mut fields)?,
        "masq" => match fields.u32(1).unwrap_or_default() {
            0 => Expression::Masquerade,
            _ => return None,
        },
        "reject" => match (fields.u32(1)?, fields.u8(2)?) {
            (ICMPX, PROHIBITED) => Expression::Reject(Refusal::Prohibited),
            _ => return None,
        },
        _ => return None,
    };
    fields.all_taken().map(|()| expression)
}

fn bits(fields: &mut Fields<'_, 9>) -> Option<Expression> {
    let (register, to, length) = (fields.u32(1)?, fields.u32(2)?, fields.u32(3)?);
    let (mask, xor) = (value(fields.bytes(4)?)?, value(fields.bytes(5)?)?);
    let is_both = fields.u32(6).unwrap_or_default() == 0;
    let fits = mask.len() == length as usize && xor.len() == mask.len() && to == register;
    let register = Register::of(register)?;
    if !(is_both && fits) {
        return None;
    }
    if xor.iter().all(|byte| *byte == 0) {
        return Some(Expression::Mask { register, mask });
    }
    let set_only = mask.iter().zip(&xor).all(|(kept, set)| kept & set == 0); // else it flips
    set_only.then_some(Expression::Bits {
        register,
        keep: mask,
        set: xor,
    })
}

fn immediate(fields: &mut Fields<'_, 9>) -> Option<Expression> {
    let (register, data) = (fields.u32(1)?, fields.bytes(DATA)?);
    if register != VERDICT_REGISTER {
        let (to, value) = (Register::of(register)?, value(data)?);
        return Some(Expression::Data { to, value });
    }
    let mut data = Fields::<3>::read(data).ok()?;
    let verdict = read_verdict(data.bytes(VERDICT)?)?;
    data.all_taken()?;
    Some(Expression::Verdict(verdict))
}

/// The kernel tells both ends of a range, and flags for what it was given.
fn nat(fields: &mut Fields<'_, 9>) -> Option<Expression> {
    let (kind, family) = (nat_of(fields.u32(1)?)?, family_of(fields.u32(2)?)?);
    let (address, last) = (fields.u32(3)?, fields.u32(4));
    let (port, last_port) = (fields.u32(5), fields.u32(6));
    let flags = fields.u32(7).unwrap_or_default();
    let one = last.is_none_or(|last| last == address) && (last_port.is_none() || last_port == port);
    if !one || flags & !(MAP_IPS | PROTO_SPECIFIED) != 0 {
        return None;
    }
    let port = match port {
        Some(port) => Some(Register::of(port)?),
        None => None,
    };
    Some(Expression::Nat {
        kind,
        family,
        address: Register::of(address)?,
        port,
    })
}

fn value(data: &[u8]) -> Option<Vec<u8>> {
    let mut data = Fields::<3>::read(data).ok()?;
    let value = data.bytes(VALUE)?.to_vec();
    data.all_taken().map(|()| value)
}

fn write_verdict(writer: &mut Writer, verdict: &Verdict) {
    writer.u32(1, verdict_number(verdict) as u32);
    if let Verdict::Jump(chain) = verdict {
        writer.text(2, chain);
    }
}

fn verdict_number(verdict: &Verdict) -> i32 {
    match verdict {
        Verdict::Drop => 0,
        Verdict::Accept => 1,
        Verdict::Jump(_) => -3,
        Verdict::Return => -5,
    }
}

fn read_verdict(data: &[u8]) -> Option<Verdict> {
    let mut data = Fields::<4>::read(data).ok()?;
    let verdict = match data.u32(1)? as i32 {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        -3 => Verdict::Jump(data.text(2)?.into_owned()),
        -5 => Verdict::Return,
        _ => return None,
    };
    data.all_taken().map(|()| verdict)
}

/// A number for each of some values, both ways.
macro_rules! numbers {
    ($type:ident $to:ident $of:ident: $($variant:ident $number:literal),+) => {
        fn $to(value: $type) -> u32 {
            match value { $($type::$variant => $number),+ }
        }

        fn $of(number: u32) -> Option<$type> {
            match number { $($number => Some($type::$variant),)+ _ => None }
        }
    };
}

numbers!(MetaKey meta_number meta_of: Mark 3, InName 6, OutName 7, Family 15, Transport 16);
numbers!(CtKey ct_number ct_of: State 0, Direction 1, Status 2, Mark 3);
numbers!(Base base_number base_of: Link 0, Network 1, Transport 2);
numbers!(Comparison comparison_number comparison_of: Equal 0, NotEqual 1, AtMost 3, AtLeast 5);
numbers!(NatKind nat_number nat_of: Source 0, Destination 1);
numbers!(NatFamily family_number family_of: Ip 2, Ip6 10);
