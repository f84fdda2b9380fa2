//! Floor 3: `namespace = "host"` on a machine of its own: a guest that other machines of the LAN reach, and that gets out.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use sovereign_tests::net::{can_run, inside};
use sovereign_tests::seat::hold;
use sovereign_tests::{Instance, Who};

/// The port on the LAN.
const PORT: u16 = 15_999;
const MACHINE: &str = "10.9.0.1";
const PEER: &str = "10.9.0.2";
/// What takes a moment in an emulated guest.
const SOON: Duration = Duration::from_secs(30);
/// What of the machine must be as it was.
const LOOK: &str = "ip -oneline link | grep -v lan0; ip -oneline address | grep -v 'inet6 fe80'; ip rule; ip -6 rule; \
    ip route show table all | grep -v '^fe80\\|^ff00\\|local fe80\\|anycast'; nft list ruleset; \
    cat /proc/sys/net/ipv4/ip_forward";

/// Another machine of the LAN.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it has usually not ended
        let _ = self.0.wait();
    }
}

impl Peer {
    fn beside(instance: &Instance) -> Result<Self> {
        let peer = Self(hold(&["--net"], &instance.path("peer"), "ip link set lo up")?);
        let (machine, pid) = (instance.machine()?, peer.0.id());
        inside(
            machine,
            &format!(
                "ip link add lan0 type veth peer name lan0 netns {pid}; ip address add {MACHINE}/24 dev lan0; \
                 ip link set lan0 up; ip route add default via {PEER}"
            ),
        )?;
        inside(
            pid,
            &format!("ip address add {PEER}/24 dev lan0; ip link set lan0 up"),
        )?;
        Ok(peer)
    }
}

/// The first byte of PostgreSQL's answer to a log-in over the network: `R` asks for the password, `E` refuses.
fn log_in(process: u32, address: &str) -> Result<String> {
    let hello = r"\0\0\0\x29\0\x03\0\0user\0postgres\0database\0postgres\0\0";
    let script = format!("exec 3<>/dev/tcp/{address}/{PORT} && printf '{hello}' >&3 && head -c1 <&3");
    let output = Command::new("nsenter")
        .args([
            "--target",
            &process.to_string(),
            "--net",
            "--",
            "timeout",
            "5",
            "bash",
            "-c",
            &script,
        ])
        .stderr(Stdio::null())
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn until(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is()? {
        ensure!(begun.elapsed() < SOON, "{what}");
        std::thread::sleep(Duration::from_millis(100)); // asks a program, waits for nothing else
    }
    Ok(())
}

fn has(conditions: &Value, layer: &str, reason: &str) -> bool {
    let all = conditions.as_array().into_iter().flatten();
    let mut found = all.filter(|condition| condition["layer"] == layer);
    found.any(|condition| condition["reason"] == reason && condition["status"] == "True")
}

#[test]
fn a_guest_is_on_the_lan_and_the_machine_is_as_it_was_afterwards() -> Result<()> {
    if !can_run("a_guest_is_on_the_lan") {
        return Ok(());
    }
    Instance::run_by(Who::OurselvesOnAnotherMachine)?.go_through(on_the_lan)
}

fn on_the_lan(instance: &Instance) -> Result<()> {
    let peer = Peer::beside(instance)?;
    let (machine, lan) = (instance.machine()?, peer.0.id());
    let before = inside(machine, LOOK)?;
    instance.write(&format!(
        "[network]\nnamespace = \"host\"\n\n[guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\n\n\
         [[guest.sql.forward]]\nname = \"lan\"\nservice = \"postgres\"\nlisten = \"0.0.0.0:{PORT}\"\nvia = \"kernel\"\n\n\
         [guest.sql.service.postgres]\nkind = \"postgres\"\n"
    ))?;
    instance.ok(&["up"])?;
    let first = instance.guest()?;
    let status = instance.status()?;
    ensure!(
        has(&status["network"], "routing", "WayOut") && has(&status["network"], "nat", "Filtered"),
        "{status:#}"
    );
    until("the forward is not translated", || {
        Ok(has(&instance.guest()?["conditions"], "forward", "Translated"))
    })?;
    ensure!(log_in(lan, MACHINE)? == "R", "from another machine");
    ensure!(log_in(machine, MACHINE)? == "R", "from this machine");
    let out = format!("busybox nc -w 3 {PEER} 9 </dev/null 2>&1 || true");
    let said = instance.ok(&["exec", "sql", "--", "sh", "-c", &out])?;
    ensure!(said.contains("refused"), "the guest gets out: {said:?}");
    ensure!(instance.ok(&["plan"])?.trim() == "nothing to do");

    // Others tidy up, and nobody notices; then without a host agent.
    inside(
        machine,
        "nft flush ruleset; echo 0 > /proc/sys/net/ipv4/ip_forward",
    )?;
    until("it does not answer after a flush", || {
        Ok(log_in(lan, MACHINE)? == "R")
    })?;
    instance.ok(&["host", "stop"])?;
    ensure!(
        log_in(lan, MACHINE)? == "R",
        "the kernel goes on without the host agent"
    );
    instance.ok(&["up"])?;
    ensure!(instance.guest()?["boot_id"] == first["boot_id"]);
    until("it does not answer after another agent", || {
        Ok(log_in(lan, MACHINE)? == "R")
    })?;
    instance.ok(&["down"])?;
    ensure!(log_in(lan, MACHINE)?.is_empty(), "nobody is there");
    let after = inside(machine, LOOK)?;
    ensure!(after == before, "{before}\n{after}");
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    Ok(())
}
