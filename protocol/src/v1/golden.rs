//! The bytes of every message of version 1. A red test here means: make a version 2.

use super::*;
use crate::codec::{decode, encode};
use crate::service::{GuestRequest, GuestResponse, HostRequest, HostResponse};

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

/// A method's number is its place in its trait: new ones come last.
#[test]
fn bytes_of_every_request_of_version_1() {
    let document = || Document::from(vec![7]);
    let correction = ClockCorrection {
        offset_ns: -2,
        bound_ns: 3,
        woke: true,
    };
    for (request, golden) in [
        (
            GuestRequest::Apply { spec: document() },
            "00000000010000000000000007",
        ),
        (
            GuestRequest::Watch {
                cursor: Some(cursor()),
                hold_ms: 9,
            },
            "01000000010100000000000000020000000000000009000000",
        ),
        (
            GuestRequest::Events {
                start: Start::Oldest,
                hold_ms: 9,
            },
            "020000000000000009000000",
        ),
        (
            GuestRequest::CorrectClock { correction },
            "03000000feffffffffffffff030000000000000001",
        ),
        (
            GuestRequest::Ping {
                ping: Ping { host_sent_ns: 1 },
            },
            "040000000100000000000000",
        ),
        (GuestRequest::Shutdown {}, "05000000"),
    ] {
        assert_eq!(hex(&request), golden, "{request:?}");
    }
    for (request, golden) in [
        (
            HostRequest::Apply { spec: document() },
            "00000000010000000000000007",
        ),
        (HostRequest::Wanted {}, "01000000"),
        (
            HostRequest::Watch {
                cursor: None,
                hold_ms: 9,
            },
            "020000000009000000",
        ),
        (
            HostRequest::Events {
                start: Start::Last(1),
                hold_ms: 9,
            },
            "0300000001000000010000000000000009000000",
        ),
        (HostRequest::Status {}, "04000000"),
        (HostRequest::Stop {}, "05000000"),
        (HostRequest::Network {}, "06000000"),
        (HostRequest::Findings {}, "07000000"),
        (
            HostRequest::RemoveLeftovers {
                names: document(),
                dry: true,
            },
            "0800000001000000000000000701",
        ),
    ] {
        assert_eq!(hex(&request), golden, "{request:?}");
    }
}

#[test]
fn bytes_of_every_response_of_version_1() {
    let applied = Ok(Applied { revision: 9 });
    let pong = Pong {
        guest_received_ns: 1,
        guest_sent_ns: 2,
    };
    let quiet = Changes {
        cursor: cursor(),
        reset: false,
        conditions: vec![],
        removed: vec![],
    };
    let none = Events {
        cursor: cursor(),
        wall_ms: 3,
        lost: 0,
        events: vec![],
    };
    let at = "01000000000000000200000000000000";
    let changes = format!("{at}0000000000000000000000000000000000");
    let events = format!("{at}030000000000000000000000000000000000000000000000");
    for (response, golden) in [
        (
            GuestResponse::Apply(applied.clone()),
            "00000000000000000900000000000000".to_owned(),
        ),
        (GuestResponse::Watch(quiet.clone()), format!("01000000{changes}")),
        (GuestResponse::Events(none.clone()), format!("02000000{events}")),
        (GuestResponse::CorrectClock(Ok(())), "0300000000000000".to_owned()),
        (
            GuestResponse::Ping(pong),
            "0400000001000000000000000200000000000000".to_owned(),
        ),
        (
            GuestResponse::Shutdown(Err(Refusal::Invalid("a".into()))),
            "050000000100000000000000010000000000000061".to_owned(),
        ),
    ] {
        assert_eq!(hex(&response), golden, "{response:?}");
    }
    for (response, golden) in [
        (
            HostResponse::Apply(applied),
            "00000000000000000900000000000000".to_owned(),
        ),
        (
            HostResponse::Wanted(Document::from(vec![7])),
            "01000000010000000000000007".to_owned(),
        ),
        (HostResponse::Watch(quiet), format!("02000000{changes}")),
        (HostResponse::Events(none), format!("03000000{events}")),
        (
            HostResponse::Status(Document::from(vec![7])),
            "04000000010000000000000007".to_owned(),
        ),
        (
            HostResponse::Stop(Err(Refusal::Failed("a".into()))),
            "050000000100000002000000010000000000000061".to_owned(),
        ),
        (
            HostResponse::Network(Document::from(vec![7])),
            "06000000010000000000000007".to_owned(),
        ),
        (
            HostResponse::Findings(Ok(Document::from(vec![7]))),
            "0700000000000000010000000000000007".to_owned(),
        ),
        (
            HostResponse::RemoveLeftovers(Err(Refusal::Conflict("a".into()))),
            "080000000100000001000000010000000000000061".to_owned(),
        ),
    ] {
        assert_eq!(hex(&response), golden, "{response:?}");
    }
}

#[test]
fn numbers_of_layers_and_statuses() {
    for (number, layer) in [
        (0, Layer::Vmm),
        (1, Layer::Session),
        (2, Layer::Kernel),
        (3, Layer::Clock),
        (4, Layer::Disk),
        (5, Layer::Loopback),
        (6, Layer::Interface),
        (7, Layer::Tap),
        (8, Layer::Routing),
        (9, Layer::Nat),
        (10, Layer::Service),
        (11, Layer::Tailscale),
        (12, Layer::Forward),
    ] {
        assert_eq!(hex(&layer), format!("{number:02x}000000"));
    }
    for (number, status) in [(0, Status::True), (1, Status::False), (2, Status::Unknown)] {
        assert_eq!(hex(&status), format!("{number:02x}000000"));
    }
}
