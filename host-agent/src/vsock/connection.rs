//! One stream's state, without rings, memory or clocks.
//!
//! Nothing is queued for a guest: what a connection has to say next is computed from its
//! state ([`Connection::next_say`]), so a guest that never listens costs a few booleans.

use std::collections::VecDeque;
use std::task::Waker;

use super::header::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// REQUEST is to be said or was said; the guest has not answered.
    Dialing,
    /// The guest answered RESPONSE; both directions may still be shut one by one.
    Open,
    /// The guest will hear and say nothing more here, but for a reset that is still due.
    Dead(End),
}

/// Why a connection is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The guest answered the dial with a reset.
    Refused,
    /// Closed in order; a reader gets what is left and then the end of the stream.
    Closed,
    /// Broken off by either side; a reader gets what is left and then an error.
    Reset,
    /// The guest's driver went away; readers get an error at once.
    GuestReset,
}

/// A control packet that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Say {
    Reset,
    Request,
    Shutdown(u32),
    CreditUpdate,
    CreditRequest,
}

/// How a data packet was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// That many more bytes are now held for the reader.
    Held(usize),
    /// The guest sent more than it was allowed to; the connection is dead.
    Overrun,
}

/// One stream between a host task and a guest port.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) phase: Phase,
    /// A [`super::Stream`] still refers to this connection.
    pub(super) owned: bool,
    /// Already in the list of those that have something to say.
    pub(super) talking: bool,
    /// Already in the list of those that wait for a receive buffer of the guest.
    pub(super) waiting: bool,
    pub(super) reader: Option<Waker>,
    /// The writer, or before the stream is open the dialer.
    pub(super) writer: Option<Waker>,

    request_said: bool,
    reset_due: bool,
    shutdown_wanted: u32,
    shutdown_said: u32,
    peer_shutdown: u32,

    inbound: VecDeque<u8>,
    /// Our receive buffer, bytes: what the guest may have in flight.
    buffer_bytes: u32,
    /// Unread bytes after which the guest is told of its new credit.
    update_bytes: u32,
    received: u32,
    forwarded: u32,
    forwarded_said: u32,
    credit_update_due: bool,

    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    credit_request_due: bool,
    stalled: bool,
}

impl Connection {
    /// A connection whose REQUEST is due. `buffer_bytes` is the receive buffer.
    pub(super) fn dialing(host_port: u32, guest_port: u32, buffer_bytes: u32) -> Self {
        Connection {
            host_port,
            guest_port,
            phase: Phase::Dialing,
            owned: true,
            talking: false,
            waiting: false,
            reader: None,
            writer: None,
            request_said: false,
            reset_due: false,
            shutdown_wanted: 0,
            shutdown_said: 0,
            peer_shutdown: 0,
            inbound: VecDeque::new(),
            buffer_bytes,
            update_bytes: (buffer_bytes / 4).max(1),
            received: 0,
            forwarded: 0,
            forwarded_said: 0,
            credit_update_due: false,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            credit_request_due: false,
            stalled: false,
        }
    }

    /// The packet that is due next, most urgent first.
    pub(super) fn next_say(&self) -> Option<Say> {
        if self.reset_due {
            return Some(Say::Reset);
        }
        match self.phase {
            Phase::Dead(_) => None,
            Phase::Dialing => (!self.request_said).then_some(Say::Request),
            Phase::Open => self.next_say_open(),
        }
    }

    fn next_say_open(&self) -> Option<Say> {
        let unread_news = self.forwarded.wrapping_sub(self.forwarded_said);
        if self.shutdown_wanted & !self.shutdown_said != 0 {
            Some(Say::Shutdown(self.shutdown_wanted))
        } else if self.credit_update_due || unread_news >= self.update_bytes {
            Some(Say::CreditUpdate)
        } else if self.credit_request_due {
            Some(Say::CreditRequest)
        } else {
            None
        }
    }

    /// Records that `say` is in the ring. Every packet carries our credit.
    pub(super) fn said(&mut self, say: Say) {
        match say {
            Say::Reset => self.reset_due = false,
            Say::Request => self.request_said = true,
            Say::Shutdown(flags) => self.shutdown_said = flags,
            Say::CreditUpdate => {}
            Say::CreditRequest => self.credit_request_due = false,
        }
        self.credit_said();
    }

    fn credit_said(&mut self) {
        self.forwarded_said = self.forwarded;
        self.credit_update_due = false;
    }

    /// Our side's credit fields, for a header.
    pub(super) fn credit_fields(&self) -> (u32, u32) {
        (self.buffer_bytes, self.forwarded)
    }

    /// Bytes the guest allows us to send now. Zero for every lie about its counters.
    pub(super) fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// Records that `bytes` of data are in the ring.
    pub(super) fn wrote(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
        self.credit_said();
    }

    /// The writer found no credit: asks the guest once for each such stall.
    pub(super) fn stall(&mut self) {
        if !self.stalled {
            self.stalled = true;
            self.credit_request_due = true;
        }
    }

    /// Takes one packet of the guest. `room` is what the guest's share of host memory still
    /// allows. Wakes by setting the returned flags (reader, writer).
    pub(super) fn receive(&mut self, header: &Header, payload: &[u8], room: usize) -> Taken {
        if matches!(self.phase, Phase::Dead(_)) {
            return Taken::Held(0);
        }
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.stalled = false;
            self.credit_request_due = false;
        }
        match (header.op, self.phase) {
            (Op::Reset, Phase::Dialing) => self.phase = Phase::Dead(End::Refused),
            (Op::Reset, _) => self.peer_reset(),
            (Op::Response, Phase::Dialing) if self.request_said => self.phase = Phase::Open,
            (Op::Data, Phase::Open) => return self.take(payload, room),
            (Op::Shutdown, Phase::Open) => self.peer_shut(header.flags),
            (Op::CreditRequest, Phase::Open) => self.credit_update_due = true,
            (Op::CreditUpdate, Phase::Open) => {}
            // A request on a live pair, an unknown operation, or an answer out of turn.
            _ => self.break_off(End::Reset),
        }
        Taken::Held(0)
    }

    fn peer_reset(&mut self) {
        let orderly = self.peer_shutdown & SHUTDOWN_SEND != 0 || self.shutdown_said == SHUTDOWN_BOTH;
        self.phase = Phase::Dead(if orderly { End::Closed } else { End::Reset });
        self.reset_due = false;
    }

    fn peer_shut(&mut self, flags: u32) {
        self.peer_shutdown |= flags & SHUTDOWN_BOTH;
        if self.peer_shutdown == SHUTDOWN_BOTH {
            // The guest's close waits for our reset, up to 8 s; what it sent stays readable.
            self.break_off(End::Closed);
        }
    }

    fn take(&mut self, payload: &[u8], room: usize) -> Taken {
        let bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let in_flight = self.received.wrapping_sub(self.forwarded);
        let allowed = self.buffer_bytes.saturating_sub(in_flight);
        let finished = self.peer_shutdown & SHUTDOWN_SEND != 0;
        if bytes > allowed || payload.len() > room || finished {
            self.break_off(End::Reset);
            return Taken::Overrun;
        }
        self.received = self.received.wrapping_add(bytes);
        if self.shutdown_wanted & SHUTDOWN_RECEIVE != 0 {
            self.forwarded = self.received;
            return Taken::Held(0);
        }
        self.grow(payload.len());
        self.inbound.extend(payload);
        Taken::Held(payload.len())
    }

    /// Doubles the buffer, but never past the advertised size.
    fn grow(&mut self, more: usize) {
        let need = self.inbound.len() + more;
        if need > self.inbound.capacity() {
            let limit = self.buffer_bytes as usize;
            let target = (self.inbound.capacity() * 2).min(limit).max(need);
            self.inbound.reserve_exact(target - self.inbound.len());
        }
    }

    /// Bytes held for the reader.
    pub(super) fn held(&self) -> usize {
        self.inbound.len()
    }

    /// Moves held bytes to `out` with `put` and returns how many.
    pub(super) fn read(&mut self, limit: usize, mut put: impl FnMut(&[u8])) -> usize {
        let bytes = limit.min(self.inbound.len());
        let (front, back) = self.inbound.as_slices();
        let from_front = bytes.min(front.len());
        put(&front[..from_front]);
        put(&back[..bytes - from_front]);
        self.inbound.drain(..bytes);
        self.forwarded = self
            .forwarded
            .wrapping_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.inbound.is_empty() && self.inbound.capacity() > 64 * 1024 {
            self.inbound = VecDeque::new();
        }
        bytes
    }

    /// No more bytes will come once those held are read.
    pub(super) fn read_finished(&self) -> bool {
        self.peer_shutdown & SHUTDOWN_SEND != 0 || self.phase == Phase::Dead(End::Closed)
    }

    /// The guest or we ended the host-to-guest direction.
    pub(super) fn write_finished(&self) -> bool {
        self.peer_shutdown & SHUTDOWN_RECEIVE != 0
            || self.shutdown_wanted & SHUTDOWN_SEND != 0
            || self.phase == Phase::Dead(End::Closed)
    }

    /// Ends the host-to-guest direction.
    pub(super) fn shut_sending(&mut self) {
        self.shutdown_wanted |= SHUTDOWN_SEND;
    }

    /// Ends the connection from our side: a reset is due if the guest knows of it.
    pub(super) fn break_off(&mut self, end: End) {
        if matches!(self.phase, Phase::Dead(_)) {
            return;
        }
        self.reset_due = self.request_said;
        self.phase = Phase::Dead(end);
    }

    /// The guest's driver is gone: nothing is due any more and held bytes are dropped.
    /// Returns how many bytes those were.
    pub(super) fn guest_reset(&mut self) -> usize {
        self.phase = Phase::Dead(End::GuestReset);
        self.reset_due = false;
        self.discard()
    }

    /// The stream was dropped. Returns the bytes that were held for it.
    ///
    /// Unread bytes make it a reset, as with TCP; otherwise the guest is told and
    /// [`Self::lingers`] is true until it answers.
    pub(super) fn release(&mut self) -> usize {
        self.owned = false;
        self.reader = None;
        self.writer = None;
        match self.phase {
            Phase::Open if self.inbound.is_empty() => self.shutdown_wanted = SHUTDOWN_BOTH,
            _ => self.break_off(End::Reset),
        }
        self.discard()
    }

    /// Dropped by its owner, and the guest has not confirmed yet.
    pub(super) fn lingers(&self) -> bool {
        !self.owned && self.phase == Phase::Open
    }

    /// Nobody needs this connection any more.
    pub(super) fn finished(&self) -> bool {
        !self.owned && matches!(self.phase, Phase::Dead(_)) && !self.reset_due
    }

    fn discard(&mut self) -> usize {
        std::mem::take(&mut self.inbound).len()
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
