use super::*;
use proptest::prelude::*;
use sovereign_protocol::condition::Status;

const OWN: &str = "192.168.100.2/24";
const OWN6: &str = "fd00:64::2/64";
const BOTH: Moved = Moved { v4: true, v6: true };

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn interface(v4: Option<u64>, v6: Option<u64>) -> InterfaceSpec {
    InterfaceSpec {
        addresses: vec![prefix(OWN), prefix(OWN6)],
        ways: Ways { v4, v6 },
        ..InterfaceSpec::default()
    }
}

fn socket(local: &str, remote: &str) -> Socket {
    Socket {
        state: State::Connected,
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        link: 0,
    }
}

/// The card is 2, Tailscale's interface 3.
fn ground() -> Ground {
    let addresses = [
        ("127.0.0.1", 1),
        ("::1", 1),
        ("192.168.100.2", 2),
        ("fd00:64::2", 2),
        ("100.101.102.103", 3),
        ("10.77.0.2", 3),
    ];
    Ground {
        networks: vec![prefix(OWN), prefix(OWN6)],
        addresses: addresses.map(|(text, link)| (text.parse().unwrap(), link)).into(),
    }
}

fn ends(socket: Socket, moved: Moved) -> bool {
    !former(&[socket], &ground(), moved).is_empty()
}

#[test]
fn the_first_number_is_no_move_and_another_one_is() {
    let mut heard = Heard::default();
    let mut hear = |v4, v6| heard.hear(&interface(v4, v6));
    let (v4, v6) = (Moved { v4: true, v6: false }, Moved { v4: false, v6: true });
    assert!(hear(Some(1), None).is_empty(), "the first");
    assert!(hear(Some(1), None).is_empty(), "the same");
    assert_eq!(hear(Some(2), Some(9)), v4, "the first of IPv6 is none");
    assert!(hear(None, None).is_empty(), "nothing is said");
    assert!(hear(Some(2), Some(9)).is_empty(), "and nothing was forgotten");
    assert_eq!(hear(Some(2), Some(12)), v6);
    assert_eq!(hear(Some(1), Some(13)), BOTH, "less is another one, too");
}

#[test]
fn what_was_heard_outlives_the_agent() {
    let mut heard = Heard::default();
    heard.hear(&interface(Some(5), Some(6)));
    let kept = serde_json::to_string(&heard).unwrap();
    let mut next: Heard = serde_json::from_str(&kept).unwrap();
    assert_eq!(next, heard);
    assert_eq!(next.networks().len(), 2);
    assert!(next.hear(&interface(Some(5), Some(6))).is_empty());
    assert!(next.hear(&interface(Some(7), None)).v4);
}

#[test]
fn only_what_we_opened_to_beyond_our_networks_ends() {
    let out = socket("192.168.100.2:40000", "203.0.113.9:443");
    let out6 = socket("[fd00:64::2]:40000", "[2001:db8::9]:443");
    assert!(ends(out, BOTH) && ends(out6, BOTH));
    let bound = |link| Socket { link, ..out };
    assert!(ends(bound(2), BOTH), "bound to the card");
    assert!(ends(socket("192.168.100.2:40000", "192.168.101.1:443"), BOTH));
    for (stays, why) in [
        (socket("192.168.100.2:40000", "192.168.100.1:53"), "the host"),
        (socket("192.168.100.2:40000", "192.168.100.3:5432"), "a sibling"),
        (socket("[fd00:64::2]:4", "[fd00:64::3]:5432"), "a sibling by IPv6"),
        (socket("192.168.100.2:40000", "192.168.100.2:5432"), "itself"),
        (socket("127.0.0.1:40000", "127.0.0.1:5432"), "the loopback"),
        (socket("[::1]:40000", "[::1]:5432"), "the loopback of IPv6"),
        (socket("[fe80::2]:4", "[fe80::1]:5"), "the link"),
        (
            socket("192.168.100.2:40000", "169.254.1.1:80"),
            "the link of IPv4",
        ),
        (socket("100.101.102.103:40000", "100.65.0.1:22"), "Tailscale's"),
        (socket("192.168.100.2:40000", "100.65.0.1:22"), "to the tailnet"),
        (
            socket("[fd00:64::2]:4", "[fd7a:115c:a1e0::7]:22"),
            "to the tailnet",
        ),
        (socket("10.77.0.2:40000", "203.0.113.9:443"), "a tunnel's address"),
        (bound(3), "bound to a tunnel"),
        (
            Socket {
                state: State::Other,
                ..out
            },
            "nobody's",
        ),
        (
            Socket {
                state: State::Listening,
                ..out
            },
            "a listener",
        ),
    ] {
        assert!(!ends(stays, BOTH), "{why}");
    }
}

#[test]
fn the_other_family_and_what_others_opened_go_on() {
    let out = socket("192.168.100.2:40000", "203.0.113.9:443");
    let v6 = Moved { v4: false, v6: true };
    assert!(!ends(out, v6) && !ends(out, Moved::default()));
    let listener = |at: &str| Socket {
        state: State::Listening,
        ..socket(at, "0.0.0.0:0")
    };
    let theirs = socket("192.168.100.2:5432", "203.0.113.9:50000");
    // Whatever it listens on: the kernel may list a listener of both families as IPv6.
    for at in ["0.0.0.0:5432", "[::]:5432", "192.168.100.2:5432"] {
        assert_eq!(former(&[theirs, out, listener(at)], &ground(), BOTH), [1], "{at}");
    }
}

#[test]
fn what_was_opened_under_an_address_of_before_ends_as_well() {
    let mut ground = ground();
    ground.networks.push(prefix("192.168.99.2/24"));
    let out = socket("192.168.99.2:40000", "203.0.113.9:443");
    assert_eq!(former(&[out], &ground, BOTH), [0]);
}

#[test]
fn the_journal_says_how_many_and_why_not_all() {
    let all = Ended {
        moved: BOTH,
        ended: 2,
        refused: Vec::new(),
    };
    let verdict = all.verdict();
    assert_eq!(
        (verdict.status, verdict.reason.as_str()),
        (Status::True, "ConnectionsEnded")
    );
    assert_eq!(
        verdict.evidence,
        "the host's way out for IPv4 and IPv6 is another one: connections of the former one ended: 2"
    );
    let some = Ended {
        refused: vec!["EPERM".to_owned(); 5],
        ..all
    };
    let verdict = some.verdict();
    assert_eq!(verdict.reason, "ConnectionsNotEnded");
    assert!(
        verdict
            .evidence
            .ends_with("ended: 2, not ended: 5 (EPERM; EPERM; EPERM)"),
        "{verdict:?}"
    );
}

fn any_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        (0u8..8).prop_map(|n| IpAddr::from([192, 168, 100, n])),
        any::<[u8; 16]>().prop_map(IpAddr::from),
        Just(IpAddr::from([127, 0, 0, 1])),
        Just(IpAddr::from([100, 64, 0, 9])),
    ]
}

prop_compose! {
    fn any_socket()(
        state in prop_oneof![Just(State::Connected), Just(State::Listening), Just(State::Other)],
        local in any_ip(), remote in any_ip(), ours in any::<bool>(),
        local_port in 1u16..8, port: u16, link in 0u32..4,
    ) -> Socket {
        let local = if ours { IpAddr::from([192, 168, 100, 2]) } else { local };
        Socket { state, local: SocketAddr::new(local, local_port), remote: SocketAddr::new(remote, port), link }
    }
}

proptest! {
    /// Whatever sockets there are: none of those that must stay is among those that end.
    #[test]
    fn nothing_ends_that_must_stay(
        sockets in prop::collection::vec(any_socket(), 0..12), v4: bool, v6: bool,
    ) {
        let (ground, moved) = (ground(), Moved { v4, v6 });
        let ended = former(&sockets, &ground, moved);
        for at in &ended {
            let socket = &sockets[*at];
            prop_assert_eq!(socket.state, State::Connected);
            prop_assert!(!socket.remote.ip().is_loopback());
            prop_assert!(!ground.networks.iter().any(|network| network.contains(socket.remote.ip())));
            prop_assert!(moved.holds(socket.remote.ip()));
            let heard = |other: &Socket| {
                other.state == State::Listening && other.local.port() == socket.local.port()
            };
            prop_assert!(!sockets.iter().any(heard));
        }
        prop_assert!(former(&sockets, &ground, Moved::default()).is_empty());
    }
}
