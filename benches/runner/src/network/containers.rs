//! What programs that set up containers' networks take for as many of them: netavark (podman's) and the CNI plugin bridge.
//!
//! They are started once for each container, watch nothing and repair nothing; so only the set-up is compared. Each
//! round has a namespace of its own that plays the machine, and the containers' namespaces are made before the clock
//! starts.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::ground;
use super::guests::MANY;

/// A namespace is there within this time.
const PATIENCE: Duration = Duration::from_secs(30);

/// A program that sets up the network of one container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tool {
    Netavark,
    Cni,
}

impl Tool {
    pub(super) const ALL: [Self; 2] = [Self::Netavark, Self::Cni];

    /// The argument that stands for it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Netavark => "netavark",
            Self::Cni => "cni",
        }
    }

    pub(super) fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tool| tool.word() == word)
    }

    /// What the table calls it.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Netavark => "netavark, one process each",
            Self::Cni => "CNI bridge + host-local, one process each",
        }
    }

    /// Where Debian's package has it.
    fn program(self) -> &'static str {
        match self {
            Self::Netavark => "/usr/lib/podman/netavark",
            Self::Cni => "/usr/lib/cni/bridge",
        }
    }

    /// Why it cannot be measured here, if it cannot.
    pub(super) fn missing(self) -> Option<String> {
        let package = match self {
            Self::Netavark => "netavark",
            Self::Cni => "containernetworking-plugins",
        };
        let there = Path::new(self.program()).is_file();
        (!there).then(|| format!("{} is not there: apt-get install {package}", self.program()))
    }

    /// Sets up the network of one container.
    fn set_up(self, number: usize, namespace: &str, state: &Path) -> Result<()> {
        let container = format!("c{number}");
        let mut command = Command::new(self.program());
        let config = match self {
            Self::Netavark => {
                command.arg("--config").arg(state).args(["setup", namespace]);
                netavark(&container, number)
            }
            Self::Cni => {
                command
                    .env("CNI_COMMAND", "ADD")
                    .env("CNI_CONTAINERID", &container)
                    .env("CNI_NETNS", namespace)
                    .env("CNI_IFNAME", "eth0")
                    .env("CNI_PATH", "/usr/lib/cni");
                cni(state)
            }
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("no {}", self.program()))?;
        serde_json::to_writer(child.stdin.take().context("no pipe")?, &config)?;
        let output = child.wait_with_output()?;
        let said = [output.stdout, output.stderr].concat();
        ensure!(
            output.status.success(),
            "{}: {}",
            self.program(),
            String::from_utf8_lossy(&said)
        );
        Ok(())
    }
}

fn netavark(container: &str, number: usize) -> Value {
    let address = format!("10.88.{}.{}", number / 250, 2 + number % 250);
    json!({
        "container_id": container,
        "container_name": container,
        "networks": { "bench": { "static_ips": [address], "interface_name": "eth0" } },
        "network_info": { "bench": {
            "name": "bench",
            "id": "b".repeat(64),
            "driver": "bridge",
            "network_interface": "podman0",
            "subnets": [{ "subnet": "10.88.0.0/16", "gateway": "10.88.0.1" }],
            "ipv6_enabled": false,
            "internal": false,
            "dns_enabled": false,
            "ipam_options": { "driver": "host-local" },
        } },
    })
}

fn cni(state: &Path) -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "bench",
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": true,
        "ipMasq": true,
        "ipam": {
            "type": "host-local",
            "dataDir": state,
            "ranges": [[{ "subnet": "10.88.0.0/16" }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    })
}

/// Processes that each hold a network namespace; they end with this.
struct Holders(Vec<Child>);

impl Holders {
    fn start() -> Result<Self> {
        let mut holders = Self(Vec::new());
        for _ in 0..MANY {
            let child = Command::new("unshare").args(["-n", "--", "sleep", "600"]).spawn();
            holders.0.push(child.context("no unshare")?);
        }
        let ours = std::fs::read_link("/proc/self/ns/net")?;
        let begun = Instant::now();
        for holder in &holders.0 {
            while std::fs::read_link(namespace(holder))? == ours {
                if begun.elapsed() > PATIENCE {
                    bail!("no namespace within {PATIENCE:?}");
                }
                std::thread::sleep(Duration::from_millis(1)); // polls a process
            }
        }
        Ok(holders)
    }
}

impl Drop for Holders {
    fn drop(&mut self) {
        for holder in &mut self.0 {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

fn namespace(holder: &Child) -> String {
    format!("/proc/{}/ns/net", holder.id())
}

/// Sets up many containers in the namespace that this process is in; prints the milliseconds that it took.
pub(super) fn run(tool: Tool) -> Result<()> {
    ground::uplink()?;
    let state = tempfile::tempdir()?;
    let holders = Holders::start()?;
    let begun = Instant::now();
    for (number, holder) in holders.0.iter().enumerate() {
        tool.set_up(number, &namespace(holder), state.path())?;
    }
    println!(
        "{}",
        serde_json::to_string(&[begun.elapsed().as_secs_f64() * 1e3])?
    );
    Ok(())
}
