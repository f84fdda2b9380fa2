use super::*;
use proptest::prelude::*;

fn whole(bytes: &[u8]) -> Result<Reply, HttpError> {
    let mut reader = Reader::default();
    match reader.take(bytes)? {
        Some(reply) => Ok(reply),
        None => reader.end(),
    }
}

fn body(bytes: &[u8]) -> String {
    String::from_utf8(whole(bytes).unwrap().body).unwrap()
}

#[test]
fn a_body_ends_by_length_by_chunks_or_with_the_stream() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\ncontent-length:  5 \r\nContent-Length: 5\r\n\r\nhelloXXX",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n05 \r\nhello\r\n00\r\nTrailer: x\r\n\r\n",
        "HTTP/1.0 200\r\n\r\nhello",
    ] {
        assert_eq!(body(answer.as_bytes()), "hello", "{answer}");
    }
    let refused = whole(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").unwrap();
    assert_eq!((refused.status, refused.body.len()), (403, 0));
}

#[test]
fn what_is_no_answer_is_refused_and_says_why() {
    let cases: [(&str, &str); 21] = [
        ("SSH-2.0-OpenSSH\r\n\r\n", "begin with HTTP/1.1"),
        ("HTTP/2 200 OK\r\n\r\n", "begin with HTTP/1.1"),
        ("HTTP/1.1 100 Continue\r\n\r\n", "ends an answer"),
        ("HTTP/1.1 2000 OK\r\n\r\n", "ends an answer"),
        ("HTTP/1.1 +20 OK\r\n\r\n", "ends an answer"),
        ("HTTP/1.1 20\r\n\r\n", "ends an answer"),
        ("HTTP/1.1 é00\r\n\r\n", "ends an answer"),
        ("HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "without a colon"),
        ("HTTP/1.1 200 OK\r\nA: b\r\n c: d\r\n\r\n", "folded"),
        ("HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\nx", "folded"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "no number"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\n", "no number"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            "no number",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "two lengths",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "a length and chunks",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "another transfer",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "chunk's length",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\nab\r\n",
            "chunk's length",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
            "chunk's length",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
            "longer than",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n",
            "chunk's length",
        ),
    ];
    for (answer, why) in cases {
        let error = whole(answer.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(why), "{answer:?}: {error}");
    }
}

#[test]
fn an_answer_that_ends_in_the_middle_is_told_from_one_that_is_whole() {
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n0\r\n\r\n";
    let sized = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhe";
    for answer in [chunked, sized] {
        for cut in 0..answer.len() {
            assert!(
                matches!(whole(&answer.as_bytes()[..cut]), Err(HttpError::Cut)),
                "{cut}"
            );
        }
        assert_eq!(body(answer.as_bytes()), "he");
    }
}

/// Feeds a pattern until the reader gives up, which must be soon after so many bytes.
fn endless(head: &str, pattern: &[u8], most: usize) -> HttpError {
    let mut reader = Reader::default();
    let mut fed = head.len();
    let mut last = reader.take(head.as_bytes()).map(drop);
    while last.is_ok() {
        assert!(fed <= most + head.len() + pattern.len(), "{head:?}: {fed}");
        last = reader.take(pattern).map(drop);
        fed += pattern.len();
    }
    last.unwrap_err()
}

#[test]
fn nothing_endless_is_read_to_its_end() {
    let chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let cases: [(&str, &[u8], usize); 7] = [
        ("", b"HTTP/1.1 200 OK", HEAD_BYTES),
        ("HTTP/1.1 200 OK\r\n", b"A: b\r\n", HEAD_BYTES),
        ("HTTP/1.1 200 OK\r\n\r\n", &[b'x'; 1000], BODY_BYTES),
        (chunks, b"3e8\r\n", HEAD_BYTES),
        (chunks, b"2\r\nab\r\n", BODY_BYTES * 4),
        (chunks, b"1;", CHUNK_LINE_BYTES),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"trailer",
            HEAD_BYTES,
        ),
    ];
    for (head, pattern, most) in cases {
        let error = endless(head, pattern, most);
        assert!(!matches!(error, HttpError::Cut), "{head:?}: {error}");
    }
    for length in ["262145", "4294967295"] {
        let error = whole(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes());
        assert!(matches!(error, Err(HttpError::TooLong { .. })), "{length}");
    }
    let error = whole(format!("{chunks}ffffffff\r\n").as_bytes());
    assert!(matches!(error, Err(HttpError::TooLong { .. })));
}

proptest! {
    #[test]
    fn the_size_of_the_pieces_does_not_matter(sizes in prop::collection::vec(1usize..9, 1..80), chunks: bool) {
        let answer = if chunks {
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\nX: y\r\n\r\n"
        } else {
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
        };
        let mut reader = Reader::default();
        let mut rest = answer.as_bytes();
        let mut sizes = sizes.into_iter().cycle();
        let reply = loop {
            let (piece, after) = rest.split_at(rest.len().min(sizes.next().unwrap()));
            rest = after;
            if let Some(reply) = reader.take(piece).unwrap() {
                break reply;
            }
            prop_assert!(!rest.is_empty());
        };
        prop_assert_eq!(reply.body, b"hello");
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = whole(&bytes);
        let framed = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice(), &bytes].concat();
        let _ = whole(&framed);
    }
}

#[test]
fn a_length_is_digits_only_and_a_body_over_its_limit_is_refused_in_pieces_too() {
    for sly in [
        "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    ] {
        assert!(whole(sly.as_bytes()).is_err(), "{sly}");
    }
    let mut reader = Reader::default();
    reader.take(b"HTTP/1.0 200\r\n\r\n").unwrap();
    assert!(reader.take(&vec![b'x'; BODY_BYTES]).unwrap().is_none());
    assert!(matches!(
        reader.take(b"x"),
        Err(HttpError::TooLong { .. } | HttpError::Malformed(_))
    ));
    let mut fits = Reader::default();
    fits.take(b"HTTP/1.0 200\r\n\r\n").unwrap();
    for _ in 0..4 {
        assert!(fits.take(&vec![b'x'; BODY_BYTES / 4]).unwrap().is_none());
    }
    assert_eq!(fits.end().unwrap().body.len(), BODY_BYTES);
}
