//! What travels between the agents and ctl.

use sovereign_protocol::boot::BootRecord;
use sovereign_protocol::bulk::{self, Answer, Open};
use sovereign_protocol::codec::{self, Guarded};
use sovereign_protocol::event::Events;
use sovereign_protocol::feed::Changes;
use sovereign_protocol::handshake::{self, BootKey, Channel, Identity};
use sovereign_protocol::interface::Prefix;
use sovereign_protocol::limits::{BULK_CHUNK_BYTES, EVIDENCE_CHARS, REASON_CHARS, SUBJECT_CHARS};
use sovereign_protocol::name::Name;
use sovereign_protocol::record::Record;
use sovereign_protocol::service::{GuestRequest, GuestResponse, HostRequest, HostResponse};
use sovereign_protocol::spec::{GuestSpec, HostSpec};
use sovereign_protocol::subnet::{HostAddress, Subnet};
use sovereign_protocol::v1;
use tarpc::{ClientMessage, Response};
use tokio::io::AsyncWriteExt;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime").block_on(future)
}

pub(crate) fn codec_request(data: &[u8]) {
    if ClientMessage::<GuestRequest>::guard(data).is_ok() {
        let _ = codec::decode::<ClientMessage<GuestRequest>>(data);
    }
    if ClientMessage::<HostRequest>::guard(data).is_ok() {
        let _ = codec::decode::<ClientMessage<HostRequest>>(data);
    }
}

/// What was read is written so that it reads the same; the kind of a tarpc error that nobody knows becomes "other".
fn assert_stable<T: serde::Serialize + for<'de> serde::Deserialize<'de>>(data: &[u8]) {
    if let Ok(read) = codec::decode::<T>(data) {
        let written = codec::encode(&read).expect("what was read can be written");
        let again: T = codec::decode(&written).expect("it was just written");
        assert_eq!(
            codec::encode(&again).expect("what was read can be written"),
            written
        );
        assert_eq!(written.len(), data.len());
    }
}

pub(crate) fn codec_response(data: &[u8]) {
    assert_stable::<Response<GuestResponse>>(data);
    assert_stable::<Response<HostResponse>>(data);
    // As the host takes them in: whatever a guest sent is within the limits.
    if let Ok(changes) = codec::decode::<v1::Changes>(data) {
        let changes = Changes::from(changes);
        for condition in &changes.conditions {
            assert!(condition.key.subject.chars().count() <= SUBJECT_CHARS);
            assert!(condition.verdict.reason.chars().count() <= REASON_CHARS);
            assert!(condition.verdict.evidence.chars().count() <= EVIDENCE_CHARS);
            let _ = condition.aged(u64::MAX);
        }
    }
    if let Ok(events) = codec::decode::<v1::Events>(data) {
        let events = Events::from(events);
        assert!(
            events
                .events
                .iter()
                .all(|event| !event.key.subject.contains(char::is_control))
        );
    }
}

fn identity() -> Identity {
    Identity {
        boot_id: "b".to_owned(),
        key: BootKey::none(),
    }
}

pub(crate) fn handshake_accept(data: &[u8]) {
    block_on(async {
        let (mut ours, mut theirs) = tokio::io::duplex(64 << 10);
        let _ = theirs.write_all(&data[..data.len().min(32 << 10)]).await;
        let _ = theirs.shutdown().await;
        let accepted = handshake::accept(&mut ours, &identity()).await;
        assert!(
            accepted.is_err(),
            "nobody can answer a nonce that is not known yet"
        );
    });
}

pub(crate) fn handshake_dial(data: &[u8]) {
    block_on(async {
        let (mut ours, mut theirs) = tokio::io::duplex(64 << 10);
        let _ = theirs.write_all(&data[..data.len().min(32 << 10)]).await;
        let _ = theirs.shutdown().await;
        let dialed = handshake::dial(&mut ours, &identity(), Channel::Guest).await;
        assert!(dialed.is_err(), "nobody can sign a nonce that is not known yet");
    });
}

pub(crate) fn bulk_frames(data: &[u8]) {
    block_on(async {
        let mut rest = data;
        while !rest.is_empty() {
            let before = rest;
            let Ok(frame) = bulk::read_frame(&mut rest).await else {
                return;
            };
            if let bulk::Frame::Data { bytes, .. } = &frame {
                assert!(bytes.len() <= BULK_CHUNK_BYTES);
            }
            let mut written = Vec::new();
            bulk::write_frame(&mut written, &frame)
                .await
                .expect("memory takes it");
            let read = &before[..before.len() - rest.len()];
            // Abort and Exit carry no lane: what stood there is not kept.
            let lane = matches!(frame, bulk::Frame::Data { .. } | bulk::Frame::End { .. });
            assert!(written[0] == read[0] && written[2..] == read[2..] && (!lane || written == read));
        }
    });
}

pub(crate) fn bulk_message(data: &[u8]) {
    block_on(async {
        if let Ok(open) = bulk::read_message::<Open, _>(&mut &data[..]).await {
            let mut written = Vec::new();
            if bulk::write_message(&mut written, &open).await.is_ok() {
                let again = bulk::read_message::<Open, _>(&mut &written[..]).await;
                assert_eq!(again.expect("it was just written"), open);
            }
        }
        let _ = bulk::read_message::<Answer, _>(&mut &data[..]).await;
    });
}

pub(crate) fn host_spec(data: &[u8]) {
    if let Ok(spec) = HostSpec::parse(data) {
        let document = serde_json::to_vec(&spec).expect("a spec is JSON");
        assert_eq!(HostSpec::parse(&document).expect("it was just written"), spec);
    }
}

pub(crate) fn guest_spec(data: &[u8]) {
    if let Ok(spec) = GuestSpec::parse(data) {
        let document = serde_json::to_vec(&spec).expect("a spec is JSON");
        assert_eq!(GuestSpec::parse(&document).expect("it was just written"), spec);
    }
}

pub(crate) fn boot_record(data: &[u8]) {
    if let Ok(record) = BootRecord::parse(data) {
        let document = serde_json::to_vec(&record).expect("a record is JSON");
        assert_eq!(BootRecord::parse(&document).expect("it was just written"), record);
    }
}

pub(crate) fn event_record(data: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<Record>(data) {
        let written = serde_json::to_value(&record).expect("a record is JSON");
        let again: Record = serde_json::from_value(written.clone()).expect("it was just written");
        assert_eq!(serde_json::to_value(&again).expect("a record is JSON"), written);
    }
}

pub(crate) fn addresses(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for line in text.lines() {
        if let Ok(name) = Name::parse(line) {
            assert_eq!(name.as_str(), line);
        }
        if let Ok(prefix) = line.parse::<Prefix>() {
            assert_eq!(prefix.to_string().parse(), Ok(prefix));
        }
        if let Ok(subnet) = Subnet::parse(line) {
            assert_eq!(
                Subnet::parse(&subnet.to_string()).expect("it was just written"),
                subnet
            );
            assert!(subnet.contains(subnet.first().ip()) && subnet.first().subnet() == subnet);
        }
        if let Ok(address) = HostAddress::parse(line) {
            assert_eq!(
                HostAddress::parse(&address.to_string()).expect("it was just written"),
                address
            );
        }
    }
}
