//! Loopback and interface on a real kernel, in a network namespace of each test's own.

#![allow(clippy::unwrap_used)] // all of this is a test

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use sovereign_guest_agent::core::net::{LO, Order, Seen, Wanted};
use sovereign_guest_agent::core::world::Event;
use sovereign_guest_agent::engine::Request;
use sovereign_guest_agent::net::kernel::{Files, Kernel};
use sovereign_guest_agent::net::socket::{Netlink, News};
use sovereign_guest_agent::net::wire::{self, MARK};
use sovereign_guest_agent::net::{self, interface_key, loopback_key};
use sovereign_protocol::condition::{Key, Status, Verdict};
use sovereign_protocol::interface::{InterfaceSpec, Prefix};
use sovereign_reconcile::observed::Link;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// No wait in these tests is longer.
const SOON: Duration = Duration::from_secs(8);
/// Not the name that one expects.
const NIC: &str = "zz0";
const A: &str = "192.168.100.2/24";
const B: &str = "192.168.100.3/24";
const GATEWAY: &str = "192.168.100.1";
const GATEWAY6: &str = "fd00::1";

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn spec(address: &str) -> InterfaceSpec {
    InterfaceSpec {
        addresses: vec![prefix(address)],
        gateways: vec![ip(GATEWAY)],
        dns: vec![ip("9.9.9.9")],
        search: Vec::new(),
        mtu: Some(1400),
        ..InterfaceSpec::default()
    }
}

/// A kernel's network with a keeper on it, and somebody who meddles.
struct Net {
    files: Files,
    _directory: tempfile::TempDir,
    orders: mpsc::Sender<Order>,
    requests: mpsc::Receiver<Request>,
    meddler: Netlink,
    eyes: Kernel,
    attempts: u64,
    /// What was seen while waiting for something else.
    story: Vec<(Key, Option<Verdict>)>,
}

impl Net {
    /// `eth0` without a driver, and a pair `zz0`-`peer` of which the first seems to be a virtio device.
    fn start(with_device: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let class_net = directory.path().join("net");
        let device = class_net.join(NIC).join("device");
        std::fs::create_dir_all(&device).unwrap();
        symlink("/sys/bus/virtio/drivers/virtio_net", device.join("driver")).unwrap();
        let files = Files {
            class_net,
            resolver: directory.path().join("resolv.conf"),
            ..Files::default()
        };
        let mut meddler = Netlink::open().unwrap();
        let mut eyes = Kernel::open(files.clone()).unwrap();
        let there = eyes.look().unwrap().network;
        for name in ["eth0", NIC] {
            let wanted = name == "eth0" || with_device;
            if wanted && there.link(name).is_none() {
                meddler.change(|s| pair(name, s)).unwrap();
            }
        }
        let (orders, queue) = mpsc::channel(4);
        let (sender, requests) = mpsc::channel(64);
        let keeper = net::run(files.clone(), queue, sender);
        // A thread of its own, as its process is in a guest; it ends with `requests`.
        std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(keeper);
        });
        let mut net = Self {
            files,
            _directory: directory,
            orders,
            requests,
            meddler,
            eyes,
            attempts: 0,
            story: Vec::new(),
        };
        if with_device {
            // The host's side of the pair, so that there is a carrier.
            let peer = net.link(NIC) - 1;
            net.meddler.change(|s| wire::up(peer, s)).unwrap();
        }
        net
    }

    fn look(&mut self) -> Seen {
        self.eyes.look().unwrap()
    }

    fn link(&mut self, name: &str) -> u32 {
        self.link_of(name).index
    }

    fn link_of(&mut self, name: &str) -> Link {
        self.look().network.link(name).unwrap().clone()
    }

    async fn order(&mut self, wanted: Wanted, strict: bool) -> Result<(), String> {
        self.attempts += 1;
        let order = Order {
            attempt: self.attempts,
            wanted,
            strict,
        };
        self.orders.send(order).await.unwrap();
        loop {
            if let Event::NetworkTaken(attempt, outcome) = self.event().await {
                assert_eq!(attempt, self.attempts);
                return outcome;
            }
        }
    }

    async fn event(&mut self) -> Event {
        let request = timeout(SOON, self.requests.recv()).await;
        let Ok(Some(Request::Event(event))) = request else {
            panic!("nothing happened; before: {:#?}", self.story)
        };
        if let Event::Seen(verdicts) = &event {
            self.story.extend(verdicts.iter().cloned());
        }
        event
    }

    /// Waits for a condition with this reason; what was told of it since the last call, in order.
    async fn until(&mut self, key: &Key, reason: &str) -> Vec<Verdict> {
        self.told(key, |told| {
            told.last().is_some_and(|verdict| verdict.reason == reason)
        })
        .await
    }

    /// Waits until something was wrong and is well again; from the first wrong verdict on.
    async fn healed(&mut self, key: &Key) -> Vec<Verdict> {
        let well = |verdict: &Verdict| verdict.status == Status::True;
        let mut told = self
            .told(key, |told| {
                told.last().is_some_and(well) && !told.iter().all(well)
            })
            .await;
        told.drain(..told.iter().take_while(|verdict| well(verdict)).count());
        told
    }

    async fn told(&mut self, key: &Key, enough: impl Fn(&[Verdict]) -> bool) -> Vec<Verdict> {
        let deadline = Instant::now() + 2 * SOON; // looks go on for ever
        loop {
            assert!(
                Instant::now() < deadline,
                "this is all that was told: {:#?}",
                self.story
            );
            let of_key = |(seen, verdict): &(Key, Option<Verdict>)| verdict.clone().filter(|_| seen == key);
            let told: Vec<Verdict> = self.story.iter().filter_map(of_key).collect();
            if enough(&told) {
                self.story.clear();
                return told;
            }
            self.event().await;
        }
    }

    fn has(&mut self, address: &str) -> bool {
        let index = self.link(NIC);
        self.on(index, address)
    }

    fn on(&mut self, link: u32, address: &str) -> bool {
        let wanted = Some(prefix(address));
        let network = self.look().network;
        network.addresses_of(link).any(|a| a.place() == wanted)
    }

    fn routes(&mut self) -> Vec<IpAddr> {
        let routes = self.look().network.routes;
        routes.iter().filter_map(|route| route.gateway).collect()
    }

    /// Adds an address as somebody else would.
    fn add_foreign(&mut self, index: u32, address: &str) {
        self.meddler
            .change(|s| {
                let mut bytes = wire::add_address(index, prefix(address), s);
                let at = bytes.len() - 4;
                assert_eq!(bytes[at], MARK);
                bytes[at] = 0;
                bytes
            })
            .unwrap();
    }

    /// Replaces the default route as somebody else would.
    fn add_foreign_route(&mut self, index: u32, gateway: &str) {
        const PROTOCOL: usize = 16 + 5;
        self.meddler
            .change(|s| {
                let mut bytes = wire::add_route(index, ip(gateway), 0, s);
                assert_eq!(bytes[PROTOCOL], MARK);
                bytes[PROTOCOL] = 4; // RTPROT_STATIC
                bytes
            })
            .unwrap();
    }
}

/// RTM_NEWLINK of a veth pair whose first end has this name; the kernel names the second.
fn pair(name: &str, sequence: u32) -> Vec<u8> {
    let attribute = |kind: u16, value: &[u8]| {
        let mut bytes = u16::try_from(4 + value.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let mut body = vec![0; 16];
    body.extend(attribute(3, format!("{name}\0").as_bytes())); // IFLA_IFNAME
    body.extend(attribute(18, &attribute(1, b"veth"))); // IFLA_LINKINFO, IFLA_INFO_KIND
    let mut bytes = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
    bytes.extend(16u16.to_ne_bytes()); // RTM_NEWLINK
    bytes.extend((1u16 | 4 | 0x200 | 0x400).to_ne_bytes()); // request, ack, exclusive, create
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

fn statuses(verdicts: &[Verdict]) -> Vec<(Status, &str)> {
    verdicts.iter().map(|v| (v.status, v.reason.as_str())).collect()
}

async fn configured(net: &mut Net) -> u32 {
    net.order(Wanted::Spec(spec(A)), false).await.unwrap();
    net.until(&interface_key(), "Configured").await;
    net.link(NIC)
}

#[tokio::test]
async fn the_interface_is_found_by_its_driver_and_configured() {
    if !common::inside("the_interface_is_found_by_its_driver_and_configured") {
        return;
    }
    let mut net = Net::start(true);
    configured(&mut net).await;
    let seen = net.look();
    let link = net.link_of(NIC);
    assert!(link.up && link.mtu == 1400, "{link:?}");
    let ours = |a: &sovereign_reconcile::observed::Address| a.place() == Some(prefix(A)) && a.ours;
    assert!(seen.network.addresses_of(link.index).any(ours), "{seen:?}");
    assert_eq!(net.routes(), [ip(GATEWAY)]);
    assert_eq!(
        std::fs::read_to_string(&net.files.resolver).unwrap(),
        "nameserver 9.9.9.9\n"
    );
    assert!(
        !net.link_of("eth0").up,
        "the other interface is nobody's business"
    );
    if !seen.ipv6 {
        return eprintln!("SKIPPED: addresses of IPv6, which this kernel does not have");
    }
    // Both families, each with its default route.
    let mut both = spec(A);
    both.addresses.push(prefix("fd00::2/64"));
    both.gateways.push(ip(GATEWAY6));
    net.order(Wanted::Spec(both.clone()), true).await.unwrap();
    let told = net.until(&interface_key(), "Configured").await;
    let evidence = &told.last().unwrap().evidence;
    assert!(
        evidence.contains("default route via 192.168.100.1 and fd00::1"),
        "{evidence}"
    );
    assert!(net.has("fd00::2/64") && net.has(A));
    assert_eq!(
        BTreeSet::from_iter(net.routes()),
        [ip(GATEWAY), ip(GATEWAY6)].into()
    );

    // Each is put back when it is taken away, and only what is wanted stays.
    let index = net.link(NIC);
    net.meddler
        .change(|s| wire::remove_route(index, ip(GATEWAY6), 512, s))
        .unwrap();
    let told = net.healed(&interface_key()).await;
    assert_eq!(
        told[0].evidence,
        "the default route via fd00::1 is missing: somebody changed it"
    );
    both.gateways[1] = ip("fd00::ff");
    net.order(Wanted::Spec(both), true).await.unwrap();
    assert_eq!(
        BTreeSet::from_iter(net.routes()),
        [ip(GATEWAY), ip("fd00::ff")].into()
    );
    net.order(Wanted::Spec(spec(A)), true).await.unwrap();
    assert!(!net.has("fd00::2/64") && net.has(A));
    assert_eq!(net.routes(), [ip(GATEWAY)]);
}

#[tokio::test]
async fn without_a_device_it_says_so_and_one_that_comes_later_is_configured() {
    if !common::inside("without_a_device_it_says_so_and_one_that_comes_later_is_configured") {
        return;
    }
    let mut net = Net::start(false);
    net.order(Wanted::Spec(spec(A)), true).await.unwrap();
    let told = net.until(&interface_key(), "NoDevice").await;
    assert!(told[0].evidence.contains("eth0"), "{told:?}");
    net.meddler.change(|s| pair(NIC, s)).unwrap();
    net.until(&interface_key(), "NoCarrier").await;
    let peer = net.link(NIC) - 1;
    net.meddler.change(|s| wire::up(peer, s)).unwrap();
    net.until(&interface_key(), "Configured").await;
}

#[tokio::test]
async fn what_somebody_takes_away_is_put_back_and_told() {
    if !common::inside("what_somebody_takes_away_is_put_back_and_told") {
        return;
    }
    let mut net = Net::start(true);
    let index = configured(&mut net).await;
    let healed = [(Status::False, "AddressMissing"), (Status::True, "Configured")];

    net.meddler
        .change(|s| wire::remove_address(index, prefix(A), s))
        .unwrap();
    let told = net.healed(&interface_key()).await;
    assert_eq!(statuses(&told), healed);
    // The default route went with the address, and both are named.
    let evidence =
        "192.168.100.2/24 is missing, the default route via 192.168.100.1 is missing: somebody changed it";
    assert_eq!(told[0].evidence, evidence);
    assert!(told[1].evidence.contains("put back within"), "{told:?}");
    assert!(net.has(A) && net.routes() == [ip(GATEWAY)]);

    net.meddler
        .change(|s| wire::remove_route(index, ip(GATEWAY), 0, s))
        .unwrap();
    let told = net.healed(&interface_key()).await;
    assert_eq!(statuses(&told)[0], (Status::False, "RouteMissing"));
    assert_eq!(net.routes(), [ip(GATEWAY)]);

    // A link that goes down takes its routes along without a word about them.
    net.meddler.change(|s| wire::down(index, s)).unwrap();
    let told = net.healed(&interface_key()).await;
    assert_eq!(statuses(&told)[0], (Status::False, "Down"));
    assert!(net.has(A) && net.routes() == [ip(GATEWAY)]);

    net.meddler.change(|s| wire::mtu(index, 1300, s)).unwrap();
    let told = net.healed(&interface_key()).await;
    assert_eq!(statuses(&told)[0], (Status::False, "OtherMtu"));
}

#[tokio::test]
async fn foreign_addresses_and_routes_stay_whatever_happens_to_ours() {
    if !common::inside("foreign_addresses_and_routes_stay_whatever_happens_to_ours") {
        return;
    }
    let mut net = Net::start(true);
    let index = configured(&mut net).await;
    net.add_foreign(index, "192.168.100.77/24");
    net.add_foreign(index, "10.9.9.9/24");
    net.add_foreign_route(index, "10.9.9.1");
    // The kernel would remove .77 with .2, whose secondary it is.
    net.order(Wanted::Spec(spec(B)), true).await.unwrap();
    net.until(&interface_key(), "Configured").await;
    assert!(!net.has(A) && net.has(B));
    assert!(net.has("192.168.100.77/24") && net.has("10.9.9.9/24"));
    let mut routes = net.routes();
    routes.sort();
    assert_eq!(routes, [ip("10.9.9.1"), ip(GATEWAY)]);

    net.order(Wanted::Nothing, true).await.unwrap();
    assert!(!net.has(B) && net.has("192.168.100.77/24") && net.has("10.9.9.9/24"));
    assert_eq!(net.routes(), [ip("10.9.9.1")]);
    assert_eq!(net.order(Wanted::Nothing, true).await, Ok(()));
    let last = net.story.iter().rfind(|(key, _)| *key == interface_key());
    assert!(
        last.is_none_or(|(_, verdict)| verdict.is_none()),
        "nothing is said about it"
    );
}

#[tokio::test]
async fn what_the_kernel_refuses_leaves_the_old_state_and_the_reason() {
    if !common::inside("what_the_kernel_refuses_leaves_the_old_state_and_the_reason") {
        return;
    }
    let mut net = Net::start(true);
    configured(&mut net).await;
    if !net.look().ipv6 {
        return eprintln!("SKIPPED: a refusal by way of IPv6, which this kernel does not have");
    }
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{NIC}/disable_ipv6"), "1").unwrap();
    let mut impossible = spec(B);
    impossible.addresses.push(prefix("fd00::3/64"));
    impossible.dns = vec![ip("1.1.1.1")];
    impossible.mtu = Some(1280);
    let refusal = net
        .order(Wanted::Spec(impossible.clone()), true)
        .await
        .unwrap_err();
    assert!(
        refusal.starts_with("fd00::3/64 is missing: address fd00::3/64: add to zz0: Permission denied"),
        "{refusal}"
    );
    assert!(net.has(A) && !net.has(B), "{:?}", net.look());
    assert_eq!(net.routes(), [ip(GATEWAY)]);
    assert_eq!(
        std::fs::read_to_string(&net.files.resolver).unwrap(),
        "nameserver 9.9.9.9\n"
    );
    net.until(&interface_key(), "Configured").await;
    assert_eq!(net.link_of(NIC).mtu, 1400);

    // What the old document says nothing about is put back as well.
    let mut silent = spec(A);
    silent.mtu = None;
    net.order(Wanted::Spec(silent), true).await.unwrap();
    net.order(Wanted::Spec(impossible.clone()), true)
        .await
        .unwrap_err();
    assert_eq!(net.link_of(NIC).mtu, 1400);

    // Without an old state it is kept as far as it goes, and the condition says how far.
    net.order(Wanted::Spec(impossible), false).await.unwrap();
    let told = net.until(&interface_key(), "AddressMissing").await;
    assert!(
        told.last().unwrap().evidence.contains("Permission denied"),
        "{told:?}"
    );
    assert!(net.has(B));
}

#[tokio::test]
async fn somebody_who_does_not_stop_is_named_and_not_fought_for_ever() {
    if !common::inside("somebody_who_does_not_stop_is_named_and_not_fought_for_ever") {
        return;
    }
    let mut net = Net::start(true);
    let index = configured(&mut net).await;
    let mut repairs = 0;
    let contested = loop {
        if net
            .meddler
            .change(|s| wire::remove_address(index, prefix(A), s))
            .is_ok()
        {
            repairs += 1;
        }
        net.event().await;
        let verdict = net
            .story
            .iter()
            .rev()
            .find_map(|(key, v)| v.clone().filter(|_| *key == interface_key()));
        if let Some(verdict) = verdict.filter(|verdict| verdict.reason == "Contested") {
            break verdict;
        }
        assert!(repairs < 20, "nobody gives way");
    };
    assert!(contested.evidence.contains("again and again"), "{contested:?}");
    assert!((6..=8).contains(&repairs), "{repairs}: five are put back at once");
    let begun = Instant::now();
    net.until(&interface_key(), "Configured").await;
    assert!(net.has(A));
    let waited = begun.elapsed();
    assert!(
        (Duration::from_millis(100)..Duration::from_secs(10)).contains(&waited),
        "{waited:?}"
    );
}

#[tokio::test]
async fn the_loopback_is_raised_and_dialled_and_healed() {
    if !common::inside("the_loopback_is_raised_and_dialled_and_healed") {
        return;
    }
    let mut net = Net::start(false);
    let told = net.until(&loopback_key(), "Answers").await;
    assert_eq!(statuses(&told), [(Status::True, "Answers")], "nobody broke it");

    net.meddler.change(|s| wire::down(LO, s)).unwrap();
    let told = net.healed(&loopback_key()).await;
    assert_eq!(
        statuses(&told),
        [(Status::False, "Down"), (Status::True, "Answers")]
    );
    assert!(told[0].evidence.starts_with("lo is down"), "{told:?}");

    let families = if net.look().ipv6 { 2 } else { 1 };
    for address in ["127.0.0.1/8", "::1/128"].into_iter().take(families) {
        net.meddler
            .change(|s| wire::remove_address(LO, prefix(address), s))
            .unwrap();
        let told = net.healed(&loopback_key()).await;
        assert_eq!(
            told[0].evidence,
            format!("{address} is missing: somebody changed it")
        );
        assert!(net.on(LO, address));
    }
}

#[tokio::test]
async fn a_loopback_that_looks_right_and_does_not_answer_is_not_called_good() {
    if !common::inside("a_loopback_that_looks_right_and_does_not_answer_is_not_called_good") {
        return;
    }
    let mut net = Net::start(false);
    net.until(&loopback_key(), "Answers").await;
    // The interface is untouched, but the way to it is forbidden.
    net.meddler.change(prohibit_loopback).unwrap();
    net.meddler.change(|s| wire::mtu(LO, 65_000, s)).unwrap(); // a change, so that it is looked at now
    let told = net.until(&loopback_key(), "NoAnswer").await;
    assert_eq!(told.last().unwrap().status, Status::False);
}

/// RTM_NEWROUTE: `prohibit 127.0.0.1` in the local table.
fn prohibit_loopback(sequence: u32) -> Vec<u8> {
    let mut bytes = wire::add_route(LO, ip("127.0.0.1"), 0, sequence);
    bytes.truncate(16 + 12);
    bytes[16 + 1] = 32; // destination length
    bytes[16 + 4] = 255; // RT_TABLE_LOCAL
    bytes[16 + 6] = 254; // RT_SCOPE_HOST
    bytes[16 + 7] = 8; // RTN_PROHIBIT
    bytes.extend([8, 0, 1, 0, 127, 0, 0, 1]); // RTA_DST
    let length = u32::try_from(bytes.len()).unwrap().to_ne_bytes();
    bytes[..4].copy_from_slice(&length);
    bytes
}

/// How long something stays broken, from the request that broke it. Printed, with a generous limit.
#[tokio::test]
async fn an_address_is_back_within_milliseconds() {
    if !common::inside("an_address_is_back_within_milliseconds") {
        return;
    }
    let mut times = Vec::new();
    for _ in 0..10 {
        let mut net = Net::start(true);
        let index = configured(&mut net).await;
        let news = News::subscribe().unwrap();
        for _ in 0..4 {
            net.meddler
                .change(|s| wire::remove_address(index, prefix(A), s))
                .unwrap();
            let begun = Instant::now();
            while !net.has(A) {
                timeout(SOON, news.wait()).await.unwrap().unwrap();
                news.forget();
            }
            times.push(begun.elapsed());
            net.healed(&interface_key()).await;
        }
        net.order(Wanted::Nothing, false).await.unwrap();
    }
    times.sort();
    let (p50, p99) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "address removed -> restored: p50 {p50:?}, worst of {} {p99:?}",
        times.len()
    );
    assert!(p50 < Duration::from_millis(500), "{p50:?}");
}
