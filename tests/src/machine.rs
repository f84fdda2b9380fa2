//! The product on a machine of its own: two uplinks, a LAN with another machine, and nothing else.
//!
//! ```text
//!  guests ---- bridge [machine] eth0 10.1.0.2 ---- eth0 10.1.0.1 [peer]
//!                               eth1 10.2.0.2 ---- eth1 10.2.0.1
//! ```

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use sovereign_host_agent::net::names;

use crate::instance::Instance;
use crate::net::left_by_the_kernel;
use crate::seat::Who;
use crate::space::{Space, State};

/// Where the machine is on the LAN.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
/// Where the other machine is.
pub const PEER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
/// What takes a probe or two in an emulated guest on a machine that is busy.
pub const SOON: Duration = Duration::from_secs(60);

/// An instance with `namespace = "host"`, its machine and the LAN. Ends with all that is in it when dropped.
pub struct Machine {
    /// The product.
    pub instance: Instance,
    space: Space,
    peer: Space,
}

impl Machine {
    /// A machine that is up and forwards nothing. Needs root; starts nothing of the product.
    ///
    /// # Errors
    /// The system's own.
    pub fn new() -> Result<Self> {
        let instance = Instance::run_by(Who::OurselvesOnAnotherMachine)?;
        let (space, peer) = (Space::of(instance.machine()?)?, Space::new()?);
        connect(&space, &peer)?;
        Ok(Self {
            instance,
            space,
            peer,
        })
    }

    /// Writes the configuration, and makes the images where packages can be fetched: the machine has no internet.
    ///
    /// # Errors
    /// With what `build` said.
    pub fn configure(&self, guests: &str) -> Result<()> {
        self.instance
            .write(&format!("[network]\nnamespace = \"host\"\n\n{guests}"))?;
        let built = self.instance.outside(&["build"]).output()?;
        let said = String::from_utf8_lossy(&built.stderr);
        ensure!(built.status.success(), "{} {said}", built.status);
        Ok(())
    }

    /// Inside the machine.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Inside the other machine.
    #[must_use]
    pub fn peer(&self) -> &Space {
        &self.peer
    }

    /// The instance's bridge, and the tag of its tables.
    ///
    /// # Errors
    /// Never: the instance has a name.
    pub fn bridge(&self) -> Result<String> {
        Ok(names::bridge(&self.instance.name()?).to_string())
    }

    /// A connection of the other machine to a port of this one; what is sent or read then fails after `within`.
    ///
    /// # Errors
    /// The system's own.
    pub fn from_peer(&self, port: u16, within: Duration) -> Result<TcpStream> {
        let to = SocketAddr::from((ADDRESS, port));
        let stream = self.peer.enter(|| TcpStream::connect_timeout(&to, within))??;
        stream.set_read_timeout(Some(within))?;
        stream.set_write_timeout(Some(within))?;
        Ok(stream)
    }

    /// All of the machine that is configured, but for what the kernel makes when it is first asked and never removes.
    ///
    /// # Errors
    /// When a program fails.
    pub fn state(&self) -> Result<State> {
        self.space.foreign_state(left_by_the_kernel)
    }
}

/// The links, and their addresses.
fn connect(machine: &Space, peer: &Space) -> Result<()> {
    let beside = peer.pid();
    machine.ip(&format!(
        "link add eth0 type veth peer name eth0 netns {beside}\n\
         link add eth1 type veth peer name eth1 netns {beside}\n"
    ))?;
    peer.ip(&format!(
        "address add {PEER}/24 dev eth0\naddress add 10.2.0.1/24 dev eth1\nlink set eth0 up\nlink set eth1 up\n"
    ))?;
    machine.ip(&format!(
        "address add {ADDRESS}/24 dev eth0\naddress add 10.2.0.2/24 dev eth1\nlink set eth0 up\nlink set eth1 up\n\
         route add default via {PEER} dev eth0 proto dhcp metric 100\n"
    ))
}

/// A machine of the same shape without the product, for what it would be then.
///
/// # Errors
/// The system's own.
pub fn without_the_product() -> Result<(Space, Space)> {
    let (machine, peer) = (Space::new()?, Space::new()?);
    connect(&machine, &peer)?;
    Ok((machine, peer))
}

/// Looks again until it is so; `look` says what it saw.
///
/// # Errors
/// After [`SOON`], with what was seen last.
pub fn until(what: &str, mut look: impl FnMut() -> Result<(bool, String)>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let (is_so, seen) = look().unwrap_or_else(|error| (false, format!("{error:#}")));
        if is_so {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < SOON,
            "{what}: not within {SOON:?}; last: {seen}"
        );
        std::thread::sleep(Duration::from_millis(100)); // asks a program, waits for nothing else
    }
}

/// Whether one of these conditions is True of this layer for this reason.
#[must_use]
pub fn holds(conditions: &Value, layer: &str, reason: &str) -> bool {
    let mut all = conditions.as_array().into_iter().flatten();
    all.any(|condition| {
        condition["layer"] == layer && condition["reason"] == reason && condition["status"] == "True"
    })
}
