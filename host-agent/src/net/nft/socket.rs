//! A netfilter netlink socket for requests: one at a time, each answered within a deadline.
//!
//! Of our own, because a batch must be one datagram and `netlink-proto` sends each message alone. The kernel does a
//! request while it is sent: the answers are there when the call returns, and are read without waiting.

use std::io;
use std::time::Duration;

use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::sockopt;

use super::attributes::{Fields, Head, Malformed, Message, Writer, messages};
use super::wire::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Script, What};
use crate::net::kernel::passed_socket;

/// An answer of the kernel must be complete within this time.
const ANSWER: Duration = Duration::from_secs(5);
/// Bytes of one read; the kernel's datagrams are smaller.
const DATAGRAM: usize = 64 << 10;
/// Room for the answers to a batch whose every message is refused.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Bytes of one batch. 1,000 guests with their senders are about 10 MB.
const LARGEST_BATCH: usize = 32 << 20;
/// NLMSG_ERROR, NLMSG_DONE.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const GENERATION: u16 = 1;
/// What the kernel answers to a batch for another generation.
pub(super) const STALE: Errno = Errno::from_raw_os_error(85); // ERESTART

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel refused; nothing was changed, and the socket is fine.
    #[error("the kernel refused {what}{}", .said.as_ref().map(|said| format!(" ({said})")).unwrap_or_default())]
    Refused {
        /// The first thing it refused.
        what: What,
        /// Its words, where it has some.
        said: Option<String>,
        /// The error.
        #[source]
        error: io::Error,
    },
    /// A table has our name and was not made by us: nothing was touched.
    #[error("the table {table} is not ours: its comment is not \"{expected}\"")]
    Conflict {
        /// `inet sv5pkj`.
        table: String,
        /// Our mark.
        expected: String,
    },
    /// A table of ours is owned by another socket, which lives: nothing was touched.
    #[error("the table {table} is owned by another netlink socket (port {port})")]
    Held {
        /// `inet sv5pkj`.
        table: String,
        /// The socket's port, which is often its process' id.
        port: u32,
    },
    /// Each try was overtaken by another program's change.
    #[error("other programs changed nf_tables during each of {0} tries")]
    Unsteady(u32),
    /// More than one batch can hold.
    #[error("{0} bytes are more than one batch can hold")]
    TooLarge(usize),
    /// No complete answer came: nothing is known, and the socket is not to be used again.
    #[error("no complete answer from the kernel")]
    NoAnswer(#[source] Option<io::Error>),
}

impl NftError {
    /// Whether the kernel refused with this error number.
    #[must_use]
    pub fn is(&self, errno: Errno) -> bool {
        matches!(self, Self::Refused { error, .. } if error.raw_os_error() == Some(errno.raw_os_error()))
    }

    /// Whether the socket may be used again.
    #[must_use]
    pub fn socket_lives(&self) -> bool {
        !matches!(self, Self::NoAnswer(_))
    }

    pub(super) fn refused(what: What, refusal: Refusal) -> Self {
        Self::Refused {
            what,
            said: refusal.said,
            error: refusal.errno.into(),
        }
    }
}

impl From<Malformed> for NftError {
    fn from(_: Malformed) -> Self {
        Self::NoAnswer(None)
    }
}

/// What the kernel says when it does not do something.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) errno: Errno,
    said: Option<String>,
}

/// What is asked for, or changed outside a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    /// Subsystem and kind.
    pub(crate) kind: u16,
    /// NFPROTO_*.
    pub(crate) family: u8,
    /// Each with its number.
    pub(crate) attributes: &'a [(u16, &'a [u8])],
}

impl Question<'_> {
    fn write(&self, writer: &mut Writer, flags: u16, sequence: u32) {
        let head = Head {
            kind: self.kind,
            flags: NLM_F_REQUEST | flags,
            sequence,
            family: self.family,
            resource: 0,
        };
        writer.message(head, |writer| {
            let all = self.attributes.iter();
            all.for_each(|(number, value)| writer.bytes(*number, value));
        });
    }
}

/// How a batch ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// All of it was done at once.
    Done,
    /// Nothing was done: the refusals in order, each with its message's number in the script.
    Refused(Vec<(What, Refusal)>),
    /// Nothing was done: others changed something after the generation.
    Stale,
}

/// The socket.
pub(crate) struct Requests {
    socket: TokioSocket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
    send_buffer: usize,
}

impl Requests {
    /// Speaks over a socket that was opened in the namespace and not bound. Needs a tokio runtime.
    pub(crate) fn over(socket: OwnedFd) -> io::Result<Self> {
        receive_buffer(&socket, RECEIVE_BUFFER)?;
        let send_buffer = sockopt::socket_send_buffer_size(&socket)?;
        let mut socket = passed_socket(socket);
        let port = socket.socket_mut().bind_auto()?.port_number();
        // Errors without a copy of what they refuse, and with words.
        let _ = socket.socket_ref().set_cap_ack(true);
        let _ = socket.socket_ref().set_ext_ack(true);
        Ok(Self {
            socket,
            port,
            sequence: 0,
            buffer: Vec::with_capacity(DATAGRAM),
            send_buffer,
        })
    }

    /// By which the kernel knows it; events of changes over this socket carry it.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// The number of the next message.
    pub(crate) fn next(&self) -> u32 {
        self.sequence.wrapping_add(1)
    }

    /// Asks for some objects at once, each with its family, and waits for one answer each.
    pub(crate) async fn get<T>(
        &mut self,
        questions: &[Question<'_>],
        read: impl Fn(&Message<'_>) -> Result<T, Malformed>,
    ) -> Result<Vec<Result<T, Refusal>>, NftError> {
        let mut writer = Writer::default();
        let first = self.next();
        for question in questions {
            question.write(&mut writer, 0, self.advance());
        }
        self.send(writer).await?;
        let mut answers: Vec<_> = questions.iter().map(|_| None).collect();
        let mut left = answers.len();
        self.answers(|message| {
            let at = message.sequence.wrapping_sub(first) as usize;
            if let Some(answer @ None) = answers.get_mut(at) {
                *answer = Some(match refusal(message)? {
                    Some(Some(refusal)) => Err(refusal),
                    Some(None) => return Ok(false), // an acknowledgement that nobody asked for
                    None => Ok(read(message)?),
                });
                left -= 1;
            }
            Ok(left == 0)
        })
        .await?;
        Ok(answers.into_iter().flatten().collect())
    }

    /// Asks for all objects of a kind. `Ok(false)` when others changed them on the way.
    pub(crate) async fn dump(
        &mut self,
        question: Question<'_>,
        mut take: impl FnMut(&Message<'_>) -> Result<(), Malformed>,
    ) -> Result<Result<bool, Refusal>, NftError> {
        let mut writer = Writer::default();
        let sequence = self.advance();
        question.write(&mut writer, NLM_F_DUMP, sequence);
        self.send(writer).await?;
        let (mut steady, mut refused) = (true, None);
        self.answers(|message| {
            if message.sequence != sequence {
                return Ok(false); // of a request that nobody waits for any more
            }
            steady &= message.flags & NLM_F_DUMP_INTR == 0;
            match refusal(message)? {
                Some(refusal) => refused = refusal,
                None if message.kind == DONE => {}
                None => return take(message).map(|()| false),
            }
            Ok(true)
        })
        .await?;
        Ok(match refused {
            Some(refusal) => Err(refusal),
            None => Ok(steady),
        })
    }

    /// Makes one change that is no batch's.
    pub(crate) async fn change(&mut self, question: Question<'_>) -> Result<Result<(), Refusal>, NftError> {
        let mut writer = Writer::default();
        let sequence = self.advance();
        question.write(&mut writer, NLM_F_ACK, sequence);
        self.send(writer).await?;
        let mut outcome = Ok(());
        self.answers(|message| {
            if message.sequence != sequence {
                return Ok(false);
            }
            let Some(answer) = refusal(message)? else {
                return Ok(false);
            };
            outcome = answer.map_or(Ok(()), Err);
            Ok(true)
        })
        .await?;
        Ok(outcome)
    }

    /// Does all of a script or nothing, for one generation if one is given. The script's messages are numbered from
    /// [`next`](Self::next) + 1 on. Not cancel safe: it may be done.
    pub(super) async fn batch(
        &mut self,
        script: Script,
        subsystem: u16,
        generation: Option<u32>,
    ) -> Result<Outcome, NftError> {
        let begin = self.advance();
        let (datagram, last) = framed(begin, script.writer, script.about.len(), subsystem, generation)?;
        self.sequence = last.wrapping_add(1);
        self.send_bytes(&datagram).await?;
        let (mut refused, mut stale) = (Vec::new(), false);
        let outcome = self
            .answers(|message| {
                let Some(answer) = refusal(message)? else {
                    return Ok(false);
                };
                let at = message.sequence.wrapping_sub(begin) as usize;
                if let Some(refusal) = answer {
                    if at == 0 {
                        stale |= refusal.errno == STALE;
                        refused.push((What::Everything, refusal));
                        return Ok(true); // the last one may have no answer
                    } else if let Some(what) = script.about.get(at - 1) {
                        refused.push((what.clone(), refusal));
                    }
                }
                Ok(message.sequence == last)
            })
            .await;
        outcome?;
        Ok(match refused {
            _ if stale => Outcome::Stale,
            refused if refused.is_empty() => Outcome::Done,
            refused => Outcome::Refused(refused),
        })
    }

    fn advance(&mut self) -> u32 {
        self.sequence = self.next();
        self.sequence
    }

    async fn send(&mut self, writer: Writer) -> Result<(), NftError> {
        let datagram = writer.finish().ok_or(NftError::TooLarge(usize::from(u16::MAX)))?;
        self.send_bytes(&datagram).await
    }

    async fn send_bytes(&mut self, datagram: &[u8]) -> Result<(), NftError> {
        let too_large = || NftError::TooLarge(datagram.len());
        if datagram.len() > LARGEST_BATCH {
            return Err(too_large());
        }
        // The kernel takes what is shorter than the buffer by a bit, and doubles what is asked for.
        if datagram.len() + 64 > self.send_buffer {
            let socket = self.socket.socket_ref();
            let wanted = datagram.len();
            if sockopt::set_socket_send_buffer_size_force(socket.as_fd(), wanted).is_err() {
                let _ = sockopt::set_socket_send_buffer_size(socket.as_fd(), wanted); // capped by wmem_max
            }
            let size = sockopt::socket_send_buffer_size(socket.as_fd());
            self.send_buffer = size.map_err(|error| NftError::NoAnswer(Some(error.into())))?;
        }
        match self.socket.send(datagram).await {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()) => Err(too_large()),
            Err(error) => Err(NftError::NoAnswer(Some(error))),
        }
    }

    /// Reads answers until `take` says that it was the last one.
    async fn answers(
        &mut self,
        mut take: impl FnMut(&Message<'_>) -> Result<bool, Malformed>,
    ) -> Result<(), NftError> {
        let reading = async {
            loop {
                self.buffer.clear();
                let received = self.socket.socket_ref().recv_from(&mut self.buffer, 0);
                let from = match received {
                    Ok((_, from)) => from,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.buffer.clear();
                        let from = self.socket.recv_from(&mut self.buffer).await;
                        from.map_err(|error| NftError::NoAnswer(Some(error)))?
                    }
                    Err(error) => return Err(NftError::NoAnswer(Some(error))),
                };
                if is_kernel(&from) && all(&self.buffer, &mut take)? {
                    return Ok(());
                }
            }
        };
        let answered = tokio::time::timeout(ANSWER, reading).await;
        answered.map_err(|_| NftError::NoAnswer(None))?
    }
}

/// Whether one of a datagram's messages was the last one.
fn all(
    datagram: &[u8],
    take: &mut impl FnMut(&Message<'_>) -> Result<bool, Malformed>,
) -> Result<bool, Malformed> {
    let mut last = false;
    for message in messages(datagram) {
        last |= take(&message?)?;
    }
    Ok(last)
}

/// Everybody can send to a netlink socket whose port is known.
pub(super) fn is_kernel(from: &SocketAddr) -> bool {
    from.port_number() == 0
}

/// Sets how much the kernel keeps for us; less where it is not ours to say.
pub(super) fn receive_buffer(socket: &OwnedFd, bytes: usize) -> io::Result<()> {
    if sockopt::set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        sockopt::set_socket_recv_buffer_size(socket, bytes)?; // capped by rmem_max
    }
    Ok(())
}

/// The batch around some messages, which are numbered from `begin` + 1 on, and the number of the last of them. Only
/// that one is acknowledged: a thousand acknowledgements would overrun the socket.
fn framed(
    begin: u32,
    messages: Writer,
    count: usize,
    subsystem: u16,
    generation: Option<u32>,
) -> Result<(Vec<u8>, u32), NftError> {
    let last = begin.wrapping_add(count as u32);
    let frame = |kind, sequence| Head {
        kind,
        flags: NLM_F_REQUEST,
        sequence,
        family: 0,
        resource: subsystem,
    };
    let too_large = || NftError::TooLarge(usize::from(u16::MAX));
    let (mut head, mut end) = (Writer::default(), Writer::default());
    head.message(frame(BATCH_BEGIN, begin), |writer| {
        if let Some(generation) = generation {
            writer.u32(GENERATION, generation);
        }
    });
    end.message(frame(BATCH_END, last.wrapping_add(1)), |_| ());
    let mut datagram = head.finish().ok_or_else(too_large)?;
    let mut messages = messages.finish().ok_or_else(too_large)?;
    acknowledge_last(&mut messages);
    datagram.append(&mut messages);
    datagram.append(&mut end.finish().ok_or_else(too_large)?);
    Ok((datagram, last))
}

fn acknowledge_last(bytes: &mut [u8]) {
    let mut at = 0;
    loop {
        let length = bytes[at..]
            .first_chunk()
            .map_or(0, |length| u32::from_ne_bytes(*length)) as usize;
        if length == 0 {
            return;
        }
        if at + length >= bytes.len() {
            bytes[at + 6] |= NLM_F_ACK as u8;
            return;
        }
        at += length;
    }
}

/// `Some(None)` for an acknowledgement, `None` for anything that is not about success.
fn refusal(message: &Message<'_>) -> Result<Option<Option<Refusal>>, Malformed> {
    if message.kind != ERROR {
        return Ok(None);
    }
    let (code, rest) = message.body.split_first_chunk().ok_or(Malformed)?;
    let code = i32::from_ne_bytes(*code);
    if code == 0 {
        return Ok(Some(None));
    }
    let errno = Errno::from_raw_os_error(code.checked_neg().unwrap_or_default());
    let said = || {
        let length = match message.flags & NLM_F_CAPPED {
            0 => u32::from_ne_bytes(*rest.first_chunk()?) as usize,
            _ => 16,
        };
        let words = rest.get(length.next_multiple_of(4)..)?;
        Some(Fields::<2>::read(words).ok()?.text(1)?.into_owned())
    };
    let said = (message.flags & NLM_F_ACK_TLVS != 0).then(said).flatten();
    Ok(Some(Some(Refusal { errno, said })))
}
