//! Floor 3: a real guest of a private namespace leaves by pasta, asks for names, and hears what changes around its host.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sovereign_host_agent::net::names;
use sovereign_tests::net::{can_run, inside};
use sovereign_tests::space::Space;
use sovereign_tests::{Instance, Who};

/// What takes a moment in an emulated guest.
const SOON: Duration = Duration::from_secs(30);
const OUTSIDE: &str = "203.0.113.1";
/// The address of every name that the server outside is asked for.
const NAMED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);

/// A name server that knows one answer to everything, until it is dropped.
struct Names {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Names {
    fn serve(space: &Space) -> Result<Self> {
        let socket = space.enter(|| UdpSocket::bind((OUTSIDE, 53)))??;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let ends = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ends);
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 512];
            while !end.load(Ordering::Relaxed) {
                if let Ok((length, peer)) = socket.recv_from(&mut bytes)
                    && let Some(answer) = answer(&bytes[..length])
                {
                    let _ = socket.send_to(&answer, peer); // who asked may be gone
                }
            }
        });
        Ok(Self {
            ends,
            thread: Some(thread),
        })
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it cannot panic
        }
    }
}

/// The answer to a question for one name (RFC 1035): [`NAMED`] where an address of IPv4 is asked for, else nothing.
fn answer(question: &[u8]) -> Option<Vec<u8>> {
    let end = 12 + question.get(12..)?.iter().position(|byte| *byte == 0)? + 5;
    let (id, asked) = (question.get(..2)?, question.get(12..end)?);
    let is_address = asked.ends_with(&[0, 1, 0, 1]);
    let mut answer = [
        id,
        &[0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0],
        asked,
    ]
    .concat();
    if is_address {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4]);
        answer.extend(NAMED.octets());
    }
    Some(answer)
}

fn in_guest(instance: &Instance, line: &str) -> Result<String> {
    let output = instance.run(&["exec", "sql", "--", "sh", "-c", line])?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Runs it in the guest until its output is as wanted.
fn until(instance: &Instance, line: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let begun = Instant::now();
    loop {
        let said = in_guest(instance, line)?;
        if wanted(&said) {
            return Ok(said);
        }
        ensure!(
            begun.elapsed() < SOON,
            "{line}: {said:?}; {:#}",
            instance.status()?
        );
        std::thread::sleep(Duration::from_millis(100)); // polls a guest
    }
}

fn says(conditions: &Value, layer: &str, reason: &str, evidence: &str) -> bool {
    let mut all = conditions.as_array().into_iter().flatten();
    all.any(|one| {
        one["layer"] == layer
            && one["reason"] == reason
            && one["evidence"]
                .as_str()
                .is_some_and(|text| text.contains(evidence))
    })
}

#[test]
fn a_guest_leaves_by_pasta_and_hears_what_changes_around_its_host() -> Result<()> {
    if !can_run("a_guest_leaves_by_pasta") {
        return Ok(());
    }
    let instance = Instance::run_by(Who::OurselvesOnAnotherMachine)?;
    let (machine, outside) = (Space::of(instance.machine()?)?, Space::new()?);
    machine.ip(&format!(
        "link add out0 type veth peer name eth0 netns {}\nlink set out0 up\naddress add 203.0.113.2/24 dev out0\n",
        outside.pid()
    ))?;
    outside.ip(&format!("link set eth0 up\naddress add {OUTSIDE}/24 dev eth0\n"))?;
    machine.ip(&format!("route add default via {OUTSIDE}\n"))?;
    let _service = outside.serve_tcp(format!("{OUTSIDE}:8080").parse()?, "outside")?;
    let _names = Names::serve(&outside)?;
    instance.go_through(leaves)
}

fn leaves(instance: &Instance) -> Result<()> {
    let resolv_conf = |text: &str| std::fs::write(instance.path("resolv.conf"), text);
    resolv_conf(&format!("nameserver {OUTSIDE}\nsearch lan.example\n"))?;
    instance.configure_network("namespace = \"private\"\nuplink = \"pasta\"", "")?;
    instance.ok(&["up"])?;
    let first = instance.guest()?;
    let network = |status: &Value| {
        let network = &status["network"];
        says(network, "routing", "WayOut", "by pasta")
            && says(network, "nat", "Filtered", "nf_tables")
            && says(network, "routing", "Advised", OUTSIDE)
    };
    instance.wait("the network works", SOON, |_| {
        instance.status().is_ok_and(|status| network(&status))
    })?;
    let out = format!("busybox timeout 3 busybox nc -w 5 {OUTSIDE} 8080 </dev/null"); // nc does not end with its peer
    until(instance, &out, |said| {
        said.starts_with("outside sees 203.0.113.2:")
    })?;
    let asked = "busybox nslookup db.lan.example; cat /etc/resolv.conf";
    let said = until(instance, asked, |said| said.contains(&NAMED.to_string()))?;
    ensure!(
        said.contains(&format!("nameserver {OUTSIDE}\nsearch lan.example\n")),
        "{said}"
    );
    instance.until_found(SOON, <[String]>::is_empty)?;

    // The host asks others now.
    resolv_conf("nameserver 203.0.113.53\nsearch other.example\n")?;
    let conf = "cat /etc/resolv.conf";
    let expected = "nameserver 203.0.113.53\nsearch other.example\n";
    until(instance, conf, |said| said == expected)?;
    // Only itself, which only pasta can reach.
    resolv_conf("nameserver 127.0.0.53\n")?;
    until(instance, conf, |said| said == "nameserver 192.0.0.3\n")?;
    until(instance, &out, |said| said.starts_with("outside sees"))?;
    // None: that is said, and taken back.
    resolv_conf("# empty\n")?;
    let told = |reason: &'static str| {
        instance.wait(reason, SOON, |_| {
            let status = instance.status();
            status.is_ok_and(|status| says(&status["network"], "routing", reason, ""))
        })
    };
    told("NoResolver")?;
    resolv_conf(&format!("nameserver {OUTSIDE}\n"))?;
    told("Advised")?;

    // The way out becomes narrower, and wide again.
    let link = names::way_out(&instance.name()?);
    for mtu in ["1400", "1500"] {
        // Again and again: pasta may be starting anew for the other name server, with a link of its own.
        instance.wait(mtu, SOON, |_| {
            let helper = instance.process(&[" netns ", "--socket"]);
            let set = helper.and_then(|helper| inside(helper, &format!("ip link set {link} mtu {mtu}")));
            let seen = in_guest(instance, "cat /sys/class/net/eth0/mtu");
            set.is_ok() && seen.is_ok_and(|seen| seen.trim() == mtu)
        })?;
    }
    let last = instance.guest()?;
    ensure!(last["boot_id"] == first["boot_id"], "{last:#}");

    // No way out any more, without a boot.
    instance.configure_network("namespace = \"private\"", "")?;
    instance.ok(&["up"])?;
    instance.wait("nothing leads out", SOON, |_| {
        let status = instance.status();
        status.is_ok_and(|status| says(&status["network"], "routing", "NoUplink", "uplink is none"))
    })?;
    until(instance, &out, |said| !said.contains("outside"))?;
    let helper = instance.process(&[" netns ", "--socket"]).context("the helper")?;
    let links = inside(helper, "ip -brief link")?;
    ensure!(!links.contains(link.as_str()), "{links}");
    instance.ok(&["down"])?;
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    Ok(())
}
