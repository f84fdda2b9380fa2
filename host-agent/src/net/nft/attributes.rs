//! Messages of netfilter netlink and their attributes, written and read. Pure.
//!
//! Our own, because a table must read back exactly as it was written: `netlink-packet-netfilter` leaves nat, masq,
//! ct, rt, exthdr, fib and reject as bytes, and drops what it does not know. Reading is bounded by the bytes that
//! are there: no length in them is believed beyond their end.

use std::borrow::Cow;

const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are its number.
const NUMBER: u16 = 0x3fff;

/// Bytes that are no netlink messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("these bytes are no netlink messages")]
pub(crate) struct Malformed;

/// Messages that are being written, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    too_long: bool,
}

/// What stands before a message's attributes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head {
    /// Subsystem and kind.
    pub(crate) kind: u16,
    /// NLM_F_*.
    pub(crate) flags: u16,
    /// By it the answer is known.
    pub(crate) sequence: u32,
    /// NFPROTO_*.
    pub(crate) family: u8,
    /// A batch's subsystem; 0 else.
    pub(crate) resource: u16,
}

impl Writer {
    /// Appends a message.
    pub(crate) fn message(&mut self, head: Head, body: impl FnOnce(&mut Self)) {
        let at = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(head.kind.to_ne_bytes());
        self.bytes.extend(head.flags.to_ne_bytes());
        self.bytes.extend(head.sequence.to_ne_bytes());
        self.bytes.extend([0; 4]); // from the kernel's view: to itself
        self.bytes.extend([head.family, 0]); // NFNETLINK_V0
        self.bytes.extend(head.resource.to_be_bytes());
        body(self);
        let length = (self.bytes.len() - at) as u32;
        self.bytes[at..at + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Appends an attribute.
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |writer| writer.bytes.extend(value));
    }

    /// Appends a text with its final zero.
    pub(crate) fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, |writer| {
            writer.bytes.extend(text.as_bytes());
            writer.bytes.push(0);
        });
    }

    /// Appends a number in network order.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Appends attributes in an attribute.
    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        self.attribute(kind | NESTED, body);
    }

    fn attribute(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let at = self.bytes.len();
        self.bytes.extend([0; 4]);
        body(self);
        let length = self.bytes.len() - at;
        self.too_long |= length > usize::from(u16::MAX);
        self.bytes[at..at + 2].copy_from_slice(&(length as u16).to_ne_bytes());
        self.bytes[at + 2..at + 4].copy_from_slice(&kind.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// All messages; `None` when an attribute was longer than one can be.
    #[must_use]
    pub(crate) fn finish(self) -> Option<Vec<u8>> {
        (!self.too_long).then_some(self.bytes)
    }
}

/// A message that was read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    /// Subsystem and kind.
    pub(crate) kind: u16,
    /// NLM_F_*.
    pub(crate) flags: u16,
    /// Of the request that it answers.
    pub(crate) sequence: u32,
    /// Of the socket that it answers, or whose change it tells.
    pub(crate) port: u32,
    /// What follows the header.
    pub(crate) body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The family (NFPROTO_*) and the attributes, of a message of netfilter.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(crate) fn netfilter(&self) -> Result<(u8, &'a [u8]), Malformed> {
        let (head, attributes) = self.body.split_at_checked(FAMILY_HEADER).ok_or(Malformed)?;
        Ok((head[0], attributes))
    }
}

/// The messages of a datagram. After something malformed there is nothing more.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Malformed>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let message = first_message(&mut bytes);
        if message.is_none() {
            bytes = &[];
        }
        Some(message.ok_or(Malformed))
    })
}

fn first_message<'a>(bytes: &mut &'a [u8]) -> Option<Message<'a>> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let body = bytes.get(HEADER..length)?;
    let short = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    let long = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let message = Message {
        kind: short(4),
        flags: short(6),
        sequence: long(8),
        port: long(12),
        body,
    };
    *bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(message)
}

/// The attributes in some bytes, each with its number. After something malformed there is nothing more.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Malformed>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let attribute = first_attribute(&mut bytes);
        if attribute.is_none() {
            bytes = &[];
        }
        Some(attribute.ok_or(Malformed))
    })
}

fn first_attribute<'a>(bytes: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let &[a, b, c, d] = bytes.first_chunk()?;
    let length = usize::from(u16::from_ne_bytes([a, b]));
    let value = bytes.get(4..length)?;
    *bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((u16::from_ne_bytes([c, d]) & NUMBER, value))
}

/// Attributes below a number, each taken at most once. Those from the number on are newer than this code, and
/// ignored: the kernel adds such to its dumps.
#[derive(Debug)]
pub(crate) struct Fields<'a, const N: usize>([Option<&'a [u8]>; N]);

impl<'a, const N: usize> Fields<'a, N> {
    /// Reads them; of two with one number the last counts, as for the kernel.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = [None; N];
        for attribute in attributes(bytes) {
            let (number, value) = attribute?;
            if let Some(field) = fields.get_mut(usize::from(number)) {
                *field = Some(value);
            }
        }
        Ok(Self(fields))
    }

    /// Takes one.
    pub(crate) fn bytes(&mut self, number: u16) -> Option<&'a [u8]> {
        self.0.get_mut(usize::from(number))?.take()
    }

    /// Takes one that is a number in network order.
    pub(crate) fn u32(&mut self, number: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(number)?.try_into().ok()?))
    }

    /// Takes one that is a single byte.
    pub(crate) fn u8(&mut self, number: u16) -> Option<u8> {
        match self.bytes(number)? {
            &[byte] => Some(byte),
            _ => None,
        }
    }

    /// Takes one that is a text.
    pub(crate) fn text(&mut self, number: u16) -> Option<Cow<'a, str>> {
        self.bytes(number).map(text)
    }

    /// `None` when something was not taken: it means more than was understood.
    #[must_use]
    pub(crate) fn all_taken(&self) -> Option<()> {
        self.0.iter().all(Option::is_none).then_some(())
    }
}

/// A text without its final zero.
pub(super) fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes))
}
