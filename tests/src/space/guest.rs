//! A guest without a VM: a namespace behind one link that can be made a port of any bridge.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use super::{Service, Space};

/// The port that each guest's TCP service listens at, of all its addresses.
pub const GUEST_PORT: u16 = 5432;

/// A namespace that plays a guest; its `eth0` is the other end of a link of the machine.
pub struct Guest {
    space: Space,
    port: String,
    address: IpAddr,
    _service: Service,
}

impl Guest {
    /// A guest whose link is called `port` on `machine`, up and in no bridge; `address` has its prefix with it.
    ///
    /// Its TCP service at [`GUEST_PORT`] says `hello-from-guest`.
    ///
    /// # Errors
    /// The system's own.
    pub fn new(machine: &Space, port: &str, address: &str, gateway: &str) -> Result<Self> {
        let space = Space::new()?;
        let inside = space.pid();
        machine.ip(&format!(
            "link add {port} type veth peer name eth0 netns {inside}\nlink set {port} up\n"
        ))?;
        let nodad = if address.contains(':') { " nodad" } else { "" };
        space.ip(&format!(
            "address add {address} dev eth0{nodad}\nlink set eth0 up\n"
        ))?;
        space.sh(&format!("ip route add default via {gateway}"))?;
        let ip = address.split('/').next().unwrap_or(address).parse()?;
        let any: SocketAddr = ([0u16; 8], GUEST_PORT).into(); // both versions of IP
        let service = space.serve_tcp(any, "hello-from-guest")?;
        Ok(Self {
            space,
            port: port.to_owned(),
            address: ip,
            _service: service,
        })
    }

    /// Makes its link a port of a bridge of the machine.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn plug(&self, machine: &Space, bridge: &str) -> Result<()> {
        machine.ip(&format!("link set {} master {bridge}\n", self.port))
    }

    /// Gives it another address beside the first.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn add_address(&self, address: &str, gateway: &str) -> Result<()> {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        self.space.sh(&format!(
            "ip address add {address} dev eth0{nodad}; ip route add default via {gateway}"
        ))?;
        Ok(())
    }

    /// Inside it.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Its first address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Where its service listens.
    #[must_use]
    pub fn service(&self) -> SocketAddr {
        SocketAddr::new(self.address, GUEST_PORT)
    }
}
