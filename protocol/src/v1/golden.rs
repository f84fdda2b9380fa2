//! The bytes of every message of version 1. A red test here means: make a version 2.

use super::*;
use crate::codec::{decode, encode};

fn hex(item: &impl Serialize) -> String {
    encode(item).unwrap().iter().map(|b| format!("{b:02x}")).collect()
}

fn cursor() -> Cursor {
    Cursor {
        incarnation: 1,
        revision: 2,
    }
}

fn condition() -> Condition {
    Condition {
        layer: Layer::Service,
        subject: "pg".into(),
        status: Status::False,
        reason: "X".into(),
        evidence: String::new(),
        age_ms: 3,
        valid_ms: 4,
        since_ms: 5,
    }
}

fn events() -> Events {
    let event = Event {
        seq: 5,
        layer: Layer::Service,
        subject: "pg".into(),
        from: Some(Status::False),
        to: Some((Status::True, "R".into(), String::new())),
        age_ms: 6,
    };
    Events {
        cursor: cursor(),
        wall_ms: 7,
        lost: 4,
        events: vec![event],
    }
}

#[test]
fn bytes_of_version_1() {
    let applied = Applied { revision: 9 };
    assert_eq!(hex(&cursor()), "01000000000000000200000000000000");
    assert_eq!(hex(&applied), "0900000000000000");
    assert_eq!(hex(&Ping { host_sent_ns: -1 }), "ffffffffffffffff");
    let pong = Pong {
        guest_received_ns: 1,
        guest_sent_ns: 2,
    };
    assert_eq!(hex(&pong), "01000000000000000200000000000000");
    assert_eq!(hex(&Refusal::Conflict("a".into())), "01000000010000000000000061");
    assert_eq!(hex(&Document::from(vec![7])), "010000000000000007");
    assert_eq!(
        hex(&condition()),
        "0a0000000200000000000000706701000000010000000000000058\
         0000000000000000030000000000000004000000000000000500000000000000"
            .replace(' ', "")
    );
    let correction = ClockCorrection {
        offset_ns: -2,
        bound_ns: 3,
        woke: true,
    };
    assert_eq!(hex(&correction), "feffffffffffffff030000000000000001");
    assert_eq!(hex(&Start::Oldest), "00000000");
    assert_eq!(hex(&Start::Last(3)), "010000000300000000000000");
    assert_eq!(
        hex(&Start::After(cursor())),
        "0200000001000000000000000200000000000000"
    );
    assert_eq!(
        hex(&events()),
        "0100000000000000020000000000000007000000000000000400000000000000010000000000000005000000000000000a000000020000000000000070\
         67010100000001000000000100000000000000520000000000000000\
         0600000000000000"
            .replace(' ', "")
    );
    let changes = Changes {
        cursor: cursor(),
        reset: true,
        conditions: vec![],
        removed: vec![(Layer::Vmm, "v".into())],
    };
    assert_eq!(
        hex(&changes),
        "010000000000000002000000000000000100000000000000000100000000000000\
         00000000010000000000000076"
    );
}

#[test]
fn messages_survive_the_way_there_and_back() {
    let changes = Changes {
        cursor: cursor(),
        reset: false,
        conditions: vec![condition()],
        removed: vec![(Layer::Vmm, "v".into())],
    };
    let read: Changes = decode(&encode(&changes).unwrap()).unwrap();
    assert_eq!(read, changes);
    assert_eq!(Changes::from(feed::Changes::from(read)), changes);
    let read: Events = decode(&encode(&events()).unwrap()).unwrap();
    assert_eq!(Events::from(event::Events::from(read)), events());
}
