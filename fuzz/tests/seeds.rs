//! Writes the seeds that our own encoders make: `cargo test --test seeds -- --ignored`.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use sovereign_kernel::testing::Module;
use sovereign_protocol::bulk::{self, Answer, Frame, Open};
use sovereign_protocol::codec::encode;
use sovereign_protocol::handshake::{self, BootKey, Channel, Identity};
use sovereign_protocol::operation::OperationId;
use sovereign_protocol::service::{GuestRequest, GuestResponse, HostRequest, HostResponse};
use sovereign_protocol::v1;
use tarpc::{ClientMessage, Request, Response};
use tokio::io::AsyncReadExt;

fn seed(target: &str, name: &str, bytes: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(name), bytes).unwrap();
}

fn request<T: serde::Serialize>(message: T) -> Vec<u8> {
    let request = Request {
        context: tarpc::context::current(),
        id: 7,
        message,
    };
    encode(&ClientMessage::Request(request)).unwrap()
}

fn response<T: serde::Serialize>(message: T) -> Vec<u8> {
    encode(&Response {
        request_id: 7,
        message: Ok(message),
    })
    .unwrap()
}

fn changes() -> v1::Changes {
    v1::Changes {
        cursor: v1::Cursor {
            incarnation: 1,
            revision: 2,
        },
        reset: true,
        conditions: vec![v1::Condition {
            layer: v1::Layer::Service,
            subject: "postgres".to_owned(),
            status: v1::Status::True,
            reason: "Ready".to_owned(),
            evidence: "SELECT 1 answered".to_owned(),
            age_ms: 1,
            valid_ms: 2,
            since_ms: 3,
        }],
        removed: vec![(v1::Layer::Disk, "data".to_owned())],
    }
}

fn events() -> v1::Events {
    v1::Events {
        cursor: v1::Cursor {
            incarnation: 1,
            revision: 2,
        },
        wall_ms: 3,
        lost: 1,
        events: vec![v1::Event {
            seq: 2,
            layer: v1::Layer::Tap,
            subject: "card".to_owned(),
            from: Some(v1::Status::Unknown),
            to: Some((v1::Status::False, "NoCarrier".to_owned(), "x".to_owned())),
            age_ms: 9,
        }],
    }
}

#[test]
#[ignore = "writes the corpus"]
fn codecs() {
    let document = v1::Document::from(b"{}".to_vec());
    let cursor = Some(changes().cursor);
    seed(
        "codec-request",
        "guest-apply",
        &request(GuestRequest::Apply {
            spec: document.clone(),
        }),
    );
    seed(
        "codec-request",
        "guest-watch",
        &request(GuestRequest::Watch {
            cursor,
            hold_ms: 8_000,
        }),
    );
    seed(
        "codec-request",
        "host-apply",
        &request(HostRequest::Apply {
            spec: document.clone(),
        }),
    );
    seed("codec-request", "host-status", &request(HostRequest::Status {}));
    let applied = v1::Applied { revision: 1 };
    let refused = v1::Refusal::Invalid("x".to_owned());
    seed(
        "codec-response",
        "applied",
        &response(GuestResponse::Apply(Ok(applied))),
    );
    seed(
        "codec-response",
        "refused",
        &response(HostResponse::Apply(Err(refused))),
    );
    seed(
        "codec-response",
        "guest-changes",
        &response(GuestResponse::Watch(changes())),
    );
    seed(
        "codec-response",
        "guest-events",
        &response(GuestResponse::Events(events())),
    );
    seed(
        "codec-response",
        "status",
        &response(HostResponse::Status(document)),
    );
    seed("codec-response", "changes", &encode(&changes()).unwrap());
    seed("codec-response", "events", &encode(&events()).unwrap());
}

#[tokio::test]
#[ignore = "writes the corpus"]
async fn streams() {
    let identity = Identity {
        boot_id: "b".to_owned(),
        key: BootKey::none(),
    };
    // What each end says, as far as it gets alone or with a peer that stops.
    let (mut near, mut far) = tokio::io::duplex(64 << 10);
    let (_, mut said) = tokio::join!(
        async {
            let _ = tokio::time::timeout(
                std::time::Duration::from_millis(100),
                handshake::dial(&mut near, &identity, Channel::Guest),
            )
            .await;
            drop(near);
        },
        async {
            let mut said = Vec::new();
            far.read_to_end(&mut said).await.unwrap();
            said
        }
    );
    seed("handshake-accept", "hello", &said);
    said.extend([7; 32]);
    seed("handshake-accept", "hello-and-mac", &said);
    let mut answer = Vec::new();
    for text in [
        r#"{"accepted":{"version":1,"agent":"0","capabilities":[],"nonce":"00"}}"#,
        r#"{"refused":{"oldest":2,"newest":3,"agent":"9","boot_id":"b"}}"#,
    ] {
        answer.clear();
        answer.extend((text.len() as u32).to_be_bytes());
        answer.extend(text.bytes());
        answer.extend([7; 32]);
        seed("handshake-dial", &text[2..5], &answer);
    }
    let mut frames = Vec::new();
    for frame in [
        Frame::Data {
            lane: 1,
            bytes: b"some bytes".to_vec(),
        },
        Frame::End { lane: 2 },
        Frame::Abort { code: 104 },
        Frame::Exit { status: 137 },
    ] {
        bulk::write_frame(&mut frames, &frame).await.unwrap();
    }
    seed("bulk-frames", "all-kinds", &frames);
    let exec = Open::Exec {
        operation: OperationId::try_from("0123456789abcdef".repeat(2)).unwrap(),
        argv: vec!["uname".to_owned(), "-a".to_owned()],
        user: Some("root".to_owned()),
    };
    let mut message = Vec::new();
    bulk::write_message(&mut message, &exec).await.unwrap();
    seed("bulk-message", "exec", &message);
    message.clear();
    let refused = Answer::Refused {
        reason: "no".to_owned(),
    };
    bulk::write_message(&mut message, &refused).await.unwrap();
    seed("bulk-message", "refused", &message);
    // Opens inside opens: JSON has a depth limit of its own.
    let deep = format!(
        "{}{}",
        r#"{"guest":{"guest":"a","open":"#.repeat(500),
        "}}".repeat(500)
    );
    let deep = [&(deep.len() as u32).to_be_bytes()[..], deep.as_bytes()].concat();
    seed("bulk-message", "deep", &deep);
}

#[test]
#[ignore = "writes the corpus"]
fn modules_and_rings() {
    let module = Module {
        modinfo: "depends=b,c-d\0alias=pci:v[0-9]*\0softdep=pre: x post: y\0alias=char-major-1-2\0",
        exports: &["one", "two"],
        needs: &["other"],
    };
    seed("module", "small", &module.elf());
    // Two chains: a header alone, and a header with four bytes in a second descriptor.
    let mut memory = vec![0_u8; 0x4000];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    for (index, (address, length, flags, next)) in [
        (0x3000_u64, 44_u32, 1_u16, 1_u16),
        (0x3100, 4, 0, 0),
        (0x3200, 44, 0, 0),
        (0x3300, 200, 2, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let at = index * 16;
        put(at, &address.to_le_bytes());
        put(at + 8, &length.to_le_bytes());
        put(at + 12, &flags.to_le_bytes());
        put(at + 14, &next.to_le_bytes());
    }
    put(0x1002, &3_u16.to_le_bytes()); // three chains are offered
    for (slot, head) in [0_u16, 2, 3].into_iter().enumerate() {
        put(0x1004 + 2 * slot, &head.to_le_bytes());
    }
    let mut header = [0_u8; 44];
    header[0] = 3;
    header[8] = 2;
    header[24] = 4;
    header[28] = 1;
    header[30] = 5;
    put(0x3000, &header);
    put(0x3200, &header);
    seed("vsock-ring", "three-chains", &memory);
    let mut talk = Vec::new();
    for (op, length, credit) in [
        (2_u8, 0_u8, 200_u8),
        (5, 100, 200),
        (7, 0, 200),
        (6, 0, 100),
        (4, 0, 0),
        (3, 0, 0),
    ] {
        let mut header = header;
        header[24] = length;
        header[30] = op;
        header[32] = 3;
        header[36] = credit;
        talk.extend(header);
    }
    seed("vsock-connection", "a-life", &talk);
    seed("vsock-header", "a-life", &talk);
}
