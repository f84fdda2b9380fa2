use super::*;

fn event(seq: u64) -> (Event, u64) {
    let event = Event {
        seq,
        key: Key::new(Layer::Service, "sql/postgres"),
        from: Some(Status::True),
        to: Some(Verdict::no("Ended", format!("{seq}"))),
        age_ms: 0,
    };
    (event, 1_000 + seq)
}

fn batch(seqs: std::ops::RangeInclusive<u64>) -> Batch {
    Batch {
        events: seqs.map(event).collect(),
        ..Batch::default()
    }
}

fn wanted(revision: u64, text: &str) -> Batch {
    Batch {
        wanted: Some((revision, Wanted::Spec(text.into()))),
        ..Batch::default()
    }
}

#[test]
fn what_was_kept_is_there_for_the_next_agent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let sql = Name::parse("sql").unwrap();
    let cursor = Cursor {
        incarnation: 4,
        revision: 9,
    };
    let incarnation = {
        let store = Store::open(&path).unwrap();
        let kept = store.load().unwrap();
        assert_eq!((kept.revision, &kept.wanted), (0, &Wanted::Nothing));
        let mut all = wanted(3, "spec");
        all.events = vec![event(1), event(2)];
        all.read.insert(sql.clone(), cursor);
        store.keep(&all).unwrap();
        kept.incarnation
    };
    let kept = Store::open(&path).unwrap().load().unwrap();
    assert_eq!(
        kept,
        Kept {
            incarnation,
            revision: 3,
            wanted: Wanted::Spec(b"spec".to_vec()),
            events: vec![event(1), event(2)],
            read: BTreeMap::from([(sql, cursor)]),
        }
    );
}

#[test]
fn what_the_journal_displaced_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("state.redb")).unwrap();
    store.keep(&batch(1..=5)).unwrap();
    let displaced = Batch {
        displaced: BTreeSet::from([1, 4, 99]),
        ..Batch::default()
    };
    assert!(!displaced.is_empty());
    store.keep(&displaced).unwrap();
    let seqs = || -> Vec<u64> {
        let events = store.load().unwrap().events;
        events.iter().map(|(event, _)| event.seq).collect()
    };
    assert_eq!(seqs(), [2, 3, 5]);

    let mut waiting = batch(6..=8); // while the disk is full, say
    waiting.merge(Batch {
        displaced: BTreeSet::from([2, 7]),
        ..Batch::default()
    });
    assert_eq!((waiting.events.len(), waiting.displaced.len()), (2, 1));
    store.keep(&waiting).unwrap();
    assert_eq!(seqs(), [3, 5, 6, 8]);
}

#[test]
fn a_damaged_store_is_named_and_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    std::fs::write(&path, b"not a store, but somebody's bytes").unwrap();
    let error = Store::open(&path).unwrap_err().to_string();
    assert!(
        error.contains("state.redb") && error.contains("move it away"),
        "{error}"
    );
    assert_eq!(
        std::fs::read(&path).unwrap(),
        b"not a store, but somebody's bytes"
    );
}

#[test]
fn a_later_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    {
        let store = Store::open(&path).unwrap();
        let change = store.database.begin_write().unwrap();
        let later = 2u64.to_le_bytes();
        change
            .open_table(META)
            .unwrap()
            .insert("format", later.as_slice())
            .unwrap();
        change.commit().unwrap();
    }
    assert!(matches!(
        Store::open(&path).unwrap_err(),
        StoreError::Format { found: 2, .. }
    ));
}

#[tokio::test(flavor = "current_thread")]
async fn the_writer_acknowledges_what_is_on_disk_and_ends_with_all_of_it_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let writer = Writer::start(Store::open(&path).unwrap()).unwrap();
    writer.keep_now(wanted(1, "a")).await.unwrap();
    assert!(writer.keep(batch(1..=3)));
    assert!(writer.keep(batch(4..=4)));
    drop(writer);
    let kept = Store::open(&path).unwrap().load().unwrap();
    assert_eq!((kept.revision, kept.events.len()), (1, 4));
}

#[test]
fn what_cannot_be_written_now_is_written_with_what_comes_but_a_refused_spec_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let store = Store::open(&path).unwrap();
    let mut merged = wanted(1, "a");
    merged.merge(batch(1..=2));
    merged.merge(wanted(2, "b"));
    store.keep(&merged).unwrap();
    let kept = store.load().unwrap();
    assert_eq!(
        (kept.revision, kept.wanted, kept.events.len()),
        (2, Wanted::Spec(b"b".to_vec()), 2)
    );
}
