//! The connection state machine, packet by packet.

use super::*;
use crate::vsock::header::{HOST_CID, TYPE_STREAM};
use proptest::prelude::*;

const BUFFER: u32 = 1024;

fn from_guest(op: Op) -> Header {
    Header {
        src_cid: 7,
        dst_cid: HOST_CID,
        src_port: 100,
        dst_port: 5,
        len: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 4096,
        fwd_cnt: 0,
    }
}

fn say(connection: &mut Connection) -> Option<Say> {
    let say = connection.next_say();
    say.into_iter().for_each(|say| connection.said(say));
    say
}

fn dialing() -> Connection {
    let mut connection = Connection::dialing(5, 100, BUFFER);
    assert_eq!(say(&mut connection), Some(Say::Request));
    assert_eq!(say(&mut connection), None);
    connection
}

fn open() -> Connection {
    let mut connection = dialing();
    connection.receive(&from_guest(Op::Response), &[], usize::MAX);
    assert_eq!(connection.phase, Phase::Open);
    connection
}

fn read_all(connection: &mut Connection) -> Vec<u8> {
    let mut out = Vec::new();
    connection.read(usize::MAX, |bytes| out.extend_from_slice(bytes));
    out
}

#[test]
fn a_refused_dial_ends_without_an_answer() {
    let mut connection = dialing();
    connection.receive(&from_guest(Op::Reset), &[], usize::MAX);
    assert_eq!(connection.phase, Phase::Dead(End::Refused));
    assert_eq!(connection.next_say(), None);
}

#[test]
fn a_dial_dropped_before_its_request_says_nothing() {
    let mut connection = Connection::dialing(5, 100, BUFFER);
    connection.release();
    assert!(connection.finished());
}

#[test]
fn a_dial_dropped_after_its_request_resets() {
    let mut connection = dialing();
    connection.release();
    assert!(!connection.finished());
    assert_eq!(say(&mut connection), Some(Say::Reset));
    assert!(connection.finished());
}

#[test]
fn an_answer_before_the_request_is_a_breach() {
    let mut connection = Connection::dialing(5, 100, BUFFER);
    connection.receive(&from_guest(Op::Response), &[], usize::MAX);
    assert_eq!(connection.phase, Phase::Dead(End::Reset));
}

#[test]
fn credit_is_told_after_a_quarter_of_the_buffer() {
    let mut connection = open();
    connection.receive(&from_guest(Op::Data), &[1; 512], usize::MAX);
    connection.read(255, |_| {});
    assert_eq!(connection.next_say(), None);
    connection.read(1, |_| {});
    assert_eq!(say(&mut connection), Some(Say::CreditUpdate));
    assert_eq!(connection.credit_fields(), (BUFFER, 256));
    assert_eq!(connection.next_say(), None);
}

#[test]
fn a_credit_request_is_answered_once() {
    let mut connection = open();
    connection.receive(&from_guest(Op::CreditRequest), &[], usize::MAX);
    assert_eq!(say(&mut connection), Some(Say::CreditUpdate));
    assert_eq!(say(&mut connection), None);
}

#[test]
fn one_credit_request_per_stall() {
    let mut connection = open();
    connection.wrote(4096);
    assert_eq!(connection.credit(), 0);
    connection.stall();
    assert_eq!(say(&mut connection), Some(Say::CreditRequest));
    connection.stall();
    assert_eq!(connection.next_say(), None);
    connection.receive(&from_guest(Op::CreditUpdate), &[], usize::MAX); // nothing new
    connection.stall();
    assert_eq!(connection.next_say(), None);
    let news = Header {
        fwd_cnt: 4096,
        ..from_guest(Op::CreditUpdate)
    };
    connection.receive(&news, &[], usize::MAX);
    assert_eq!(connection.credit(), 4096);
    connection.wrote(4096);
    connection.stall();
    assert_eq!(say(&mut connection), Some(Say::CreditRequest));
}

#[test]
fn lies_about_credit_give_none() {
    for (buf_alloc, fwd_cnt, credit) in [
        (0, 0, 0),
        (4096, u32::MAX, 4085),
        (4096, 11, 0),
        (u32::MAX, 11, 0),
        (u32::MAX, 10, u32::MAX),
    ] {
        let mut connection = open();
        connection.wrote(10);
        let lie = Header {
            buf_alloc,
            fwd_cnt,
            ..from_guest(Op::CreditUpdate)
        };
        connection.receive(&lie, &[], usize::MAX);
        assert_eq!(connection.credit(), credit, "{buf_alloc} {fwd_cnt}");
    }
}

#[test]
fn an_overrun_is_a_reset_and_takes_no_memory() {
    let mut connection = open();
    assert_eq!(
        connection.receive(&from_guest(Op::Data), &[1; 1024], usize::MAX),
        Taken::Held(1024)
    );
    assert_eq!(
        connection.receive(&from_guest(Op::Data), &[1], usize::MAX),
        Taken::Overrun
    );
    assert_eq!(connection.held(), 1024);
    assert_eq!(say(&mut connection), Some(Say::Reset));
    let mut connection = open();
    assert_eq!(
        connection.receive(&from_guest(Op::Data), &[1; 2], 1),
        Taken::Overrun
    );
}

#[test]
fn a_guest_close_keeps_what_it_sent_and_is_confirmed() {
    let mut connection = open();
    connection.receive(&from_guest(Op::Data), b"bye", usize::MAX);
    let close = Header {
        flags: SHUTDOWN_BOTH,
        ..from_guest(Op::Shutdown)
    };
    connection.receive(&close, &[], usize::MAX);
    assert_eq!(say(&mut connection), Some(Say::Reset));
    assert!(connection.read_finished());
    assert_eq!(read_all(&mut connection), b"bye");
    connection.release();
    assert!(connection.finished());
}

#[test]
fn half_closes_are_apart() {
    let mut connection = open();
    let end = Header {
        flags: SHUTDOWN_SEND,
        ..from_guest(Op::Shutdown)
    };
    connection.receive(&end, &[], usize::MAX);
    assert!(connection.read_finished() && !connection.write_finished());
    assert_eq!(connection.phase, Phase::Open);
    assert_eq!(
        connection.receive(&from_guest(Op::Data), b"more", usize::MAX),
        Taken::Overrun
    );

    let mut connection = open();
    connection.shut_sending();
    assert_eq!(say(&mut connection), Some(Say::Shutdown(SHUTDOWN_SEND)));
    assert!(!connection.read_finished() && connection.write_finished());
    assert_eq!(
        connection.receive(&from_guest(Op::Data), b"more", usize::MAX),
        Taken::Held(4)
    );
}

#[test]
fn a_drop_lingers_until_the_guest_confirms() {
    let mut connection = open();
    connection.release();
    assert_eq!(say(&mut connection), Some(Say::Shutdown(SHUTDOWN_BOTH)));
    assert!(connection.lingers() && !connection.finished());
    assert_eq!(
        connection.receive(&from_guest(Op::Data), b"late", usize::MAX),
        Taken::Held(0)
    );
    connection.receive(&from_guest(Op::Reset), &[], usize::MAX);
    assert!(connection.finished());
}

#[test]
fn a_drop_with_unread_bytes_resets() {
    let mut connection = open();
    connection.receive(&from_guest(Op::Data), b"unread", usize::MAX);
    assert_eq!(connection.release(), 6);
    assert_eq!(say(&mut connection), Some(Say::Reset));
    assert!(connection.finished());
}

#[test]
fn requests_and_unknown_operations_on_a_live_pair_reset_it() {
    for op in [Op::Request, Op::Response, Op::Unknown(0), Op::Unknown(99)] {
        let mut connection = open();
        connection.receive(&from_guest(op), &[], usize::MAX);
        assert_eq!(say(&mut connection), Some(Say::Reset), "{op:?}");
    }
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        Just(Op::Request),
        Just(Op::Response),
        Just(Op::Reset),
        Just(Op::Shutdown),
        Just(Op::Data),
        Just(Op::CreditUpdate),
        Just(Op::CreditRequest),
        any::<u16>().prop_map(Op::Unknown),
    ]
}

proptest! {
    /// Whatever the guest sends and whatever the host does in between: the buffer is bounded,
    /// the connection falls silent, and once dropped and reset it is forgotten.
    #[test]
    fn no_sequence_breaks_the_bounds(
        steps in prop::collection::vec(
            (any_op(), any::<u32>(), any::<u32>(), any::<u32>(), 0usize..700, 0u8..6),
            0..60,
        )
    ) {
        let mut connection = Connection::dialing(5, 100, BUFFER);
        for (op, flags, buf_alloc, fwd_cnt, len, host) in steps {
            match host {
                0 => { connection.read(len, |_| {}); }
                1 => connection.stall(),
                2 => connection.wrote(connection.credit().min(4096)),
                3 => connection.shut_sending(),
                4 => { say(&mut connection); }
                _ => {}
            }
            let header = Header { flags, buf_alloc, fwd_cnt, ..from_guest(op) };
            connection.receive(&header, &vec![0; len], usize::MAX);
            prop_assert!(connection.held() <= BUFFER as usize);
            prop_assert!(connection.inbound.capacity() <= BUFFER as usize);
        }
        for _ in 0..5 {
            say(&mut connection);
        }
        prop_assert_eq!(connection.next_say(), None);
        connection.release();
        connection.break_off(End::Closed);
        say(&mut connection);
        prop_assert!(connection.finished());
    }
}
