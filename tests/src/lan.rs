//! A plain Linux machine with two uplinks in a LAN with another machine, and the software that gets in the way.
//!
//! ```text
//!  guest ns            machine ns                     internet ns                       peer ns
//!  192.168.100.2 ---- vm_sql, a port of any bridge
//!  fd00:64::2          eth0 10.1.0.2, fd10:1::2 ---- lan0 10.1.0.1, fd10:1::1 --------- 10.1.0.9, fd10:1::9
//!                      eth1 10.2.0.2, fd10:2::2 ---- isp1 10.2.0.1, fd10:2::1
//!                                                    8.8.8.8, 2001:db8::8 on lo
//! ```
//!
//! `eth0` has the better default route. Nothing is installed and no daemon runs: rules of the shape that Docker and
//! firewalld make, and what they and systemd-networkd do to everybody else's.
//!
//! **With an agent**: start it with [`Lan::machine`]`.command(..)`, [`Lan::plug`] the guest into its bridge (gateway
//! [`GATEWAY`] and [`GATEWAY6`]), and disturb. [`Lan::answers`], [`Lan::from_peer`] and
//! [`Lan::foreign_state`] say what came of it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

pub use crate::space::Way;
use crate::space::{ANSWER, Guest, SILENCE, Service, Space, State, soon};

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 2);
/// The machine's address on the guests' bridge.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 1);
/// The guests' subnet.
pub const SUBNET: &str = "192.168.100.0/24";
/// The guest's other address.
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x64, 0, 0, 0, 0, 0, 2);
/// The machine's other address on the guests' bridge.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x64, 0, 0, 0, 0, 0, 1);
/// The guests' other subnet.
pub const SUBNET6: &str = "fd00:64::/64";
/// A machine on the internet; its TCP service at [`PORT`] says `hello-from-wan` and whom it sees.
pub const INTERNET: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// Its other address.
pub const INTERNET6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 8);
/// Another machine in the LAN of `eth0`; its TCP service at [`PORT`] says `hello-from-peer`.
pub const PEER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 9);
/// Where services of the internet and of the peer listen.
pub const PORT: u16 = 7777;

/// An uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nic {
    /// In the LAN with the peer.
    Eth0,
    /// A second provider.
    Eth1,
}

impl Nic {
    /// The machine's address on it.
    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.number(), 0, 2)
    }

    fn number(self) -> u8 {
        match self {
            Self::Eth0 => 1,
            Self::Eth1 => 2,
        }
    }

    /// Its default routes, as a DHCP client makes them.
    fn routes(self, change: &str, metric: u16) -> String {
        let net = self.number();
        format!(
            "route {change} default via 10.{net}.0.1 dev {self} proto dhcp metric {metric}\n\
             -6 route {change} default via fd10:{net}::1 dev {self} proto ra metric {metric}\n"
        )
    }
}

impl fmt::Display for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eth0 => "eth0",
            Self::Eth1 => "eth1",
        })
    }
}

/// What a firewall does with packets that are not for the machine itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarded {
    /// They pass.
    Accepted,
    /// They are refused, but for connections that are established or translated, as firewalld does it.
    Refused,
}

/// The machine, its guest, its LAN. Ends with all that is in it when dropped.
pub struct Lan {
    machine: Space,
    guest: Guest,
    internet: Space,
    peer: Space,
    _services: [Service; 2],
}

const BETTER: u16 = 100;
const WORSE: u16 = 200;

impl Lan {
    /// A machine that is up and forwards nothing. Needs root.
    ///
    /// # Errors
    /// The system's own.
    pub fn new() -> Result<Self> {
        let (machine, internet, peer) = (Space::new()?, Space::new()?, Space::new()?);
        links(&machine, &internet, &peer)?;
        let guest = Guest::new(&machine, "vm_sql", &format!("{GUEST}/24"), &GATEWAY.to_string())?;
        guest.add_address(&format!("{GUEST6}/64"), &GATEWAY6.to_string())?;
        let any = SocketAddr::from(([0u16; 8], PORT));
        let services = [
            internet.serve_tcp(any, "hello-from-wan")?,
            peer.serve_tcp(any, "hello-from-peer")?,
        ];
        Ok(Self {
            machine,
            guest,
            internet,
            peer,
            _services: services,
        })
    }

    /// The machine itself.
    #[must_use]
    pub fn machine(&self) -> &Space {
        &self.machine
    }

    /// The machine, to change what programs it has.
    pub fn machine_mut(&mut self) -> &mut Space {
        &mut self.machine
    }

    /// The guest.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The other side of both uplinks.
    #[must_use]
    pub fn internet(&self) -> &Space {
        &self.internet
    }

    /// The other machine in the LAN.
    #[must_use]
    pub fn peer(&self) -> &Space {
        &self.peer
    }

    /// Makes the guest a port of this bridge.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn plug(&self, bridge: &str) -> Result<()> {
        self.guest.plug(&self.machine, bridge)
    }

    /// Gives this uplink the better default route.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn prefer(&self, nic: Nic) -> Result<()> {
        let other = if nic == Nic::Eth0 { Nic::Eth1 } else { Nic::Eth0 };
        // A replaced route is that of the same metric; at no moment is there no default route.
        self.machine.ip(&[
            nic.routes("replace", BETTER / 2),
            nic.routes("replace", BETTER),
            other.routes("replace", WORSE),
            nic.routes("del", BETTER / 2),
        ]
        .concat())
    }

    /// An uplink's link goes down; the kernel removes its IPv4 routes without telling of each.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn link_down(&self, nic: Nic) -> Result<()> {
        self.machine.ip(&format!("link set {nic} down\n"))
    }

    /// It comes back, with its default routes.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn link_up(&self, nic: Nic) -> Result<()> {
        let net = nic.number();
        let metric = if nic == Nic::Eth0 { BETTER } else { WORSE };
        self.machine.ip(&format!(
            "link set {nic} up\n-6 address replace fd10:{net}::2/64 dev {nic} nodad\n{}",
            nic.routes("replace", metric)
        ))
    }

    /// Docker's rules: forwarded packets are dropped by policy, its own chains come first.
    ///
    /// # Errors
    /// With what `iptables` said.
    pub fn docker(&self) -> Result<()> {
        let text = "*filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n:DOCKER-FORWARD - [0:0]\n\
            -A FORWARD -j DOCKER-USER\n-A FORWARD -j DOCKER-FORWARD\n-A DOCKER-USER -j RETURN\n\
            -A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
            -A DOCKER-FORWARD -i docker0 -j ACCEPT\nCOMMIT\n\
            *nat\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
            -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER\n\
            -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\nCOMMIT\n";
        self.machine
            .feed(&["iptables-restore", "--noflush"], text)
            .map(drop)
    }

    /// Docker starts again: its jumps are put before everybody's.
    ///
    /// # Errors
    /// With what `iptables` said.
    pub fn docker_restart(&self) -> Result<()> {
        let text = "*filter\n-D FORWARD -j DOCKER-USER\n-D FORWARD -j DOCKER-FORWARD\n\
            -I FORWARD -j DOCKER-FORWARD\n-I FORWARD -j DOCKER-USER\nCOMMIT\n";
        self.machine
            .feed(&["iptables-restore", "--noflush"], text)
            .map(drop)
    }

    /// firewalld starts or reloads: its own table is replaced in one transaction, others' stay.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn firewalld_reload(&self, forwarded: Forwarded) -> Result<()> {
        let last = match forwarded {
            Forwarded::Accepted => "accept",
            Forwarded::Refused => "reject with icmpx admin-prohibited",
        };
        let text = format!(
            "table inet firewalld\ndelete table inet firewalld\ntable inet firewalld {{\n\
             chain filter_FORWARD {{ type filter hook forward priority filter + 10; policy accept;\n\
             ct state established,related accept\nct status dnat accept\niifname \"lo\" accept\n\
             ct state invalid drop\n{last}\n}}\n\
             chain nat_POSTROUTING {{ type nat hook postrouting priority srcnat + 10; policy accept; }}\n}}\n"
        );
        self.machine.feed(&["nft", "-f", "-"], &text).map(drop)
    }

    /// Somebody loads his /etc/nftables.conf, which begins so.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn nft_flush(&self) -> Result<()> {
        self.machine.sh("nft flush ruleset").map(drop)
    }

    /// systemd-networkd starts with `ManageForeignRoutes=` and `ManageForeignRoutingPolicyRules=` as they are by default: all
    /// rules and routes go that neither the kernel nor DHCP nor a router made.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn networkd_sweep(&self) -> Result<()> {
        let mut lines = String::new();
        for family in ["-4", "-6"] {
            for rule in self.machine.ip_json(&format!("{family} -details rule show"))? {
                if rule["protocol"] != "kernel" {
                    lines += &format!("{family} rule del pref {}\n", rule["priority"]);
                }
            }
            for route in self
                .machine
                .ip_json(&format!("{family} -details route show table all"))?
            {
                let protocol = route["protocol"].as_str().unwrap_or_default();
                if !["kernel", "dhcp", "ra"].contains(&protocol) {
                    let word = |key| route[key].as_str().unwrap_or_default();
                    let kind = if word("type") == "unicast" {
                        ""
                    } else {
                        word("type")
                    };
                    let table = if word("table").is_empty() {
                        "main"
                    } else {
                        word("table")
                    };
                    let metric = route["metric"]
                        .as_u64()
                        .map_or_else(String::new, |m| format!(" metric {m}"));
                    lines += &format!(
                        "{family} route del {kind} {} table {table}{metric}\n",
                        word("dst")
                    );
                }
            }
        }
        self.machine.ip(&lines)
    }

    /// What a TCP service of the machine or of a guest says to the other machine in the LAN.
    ///
    /// # Errors
    /// Why it says nothing.
    pub fn from_peer(&self, to: SocketAddr, within: Duration) -> Result<String> {
        self.peer.ask_tcp(to, within)
    }

    /// What the internet's service says to the guest.
    ///
    /// # Errors
    /// Why it says nothing.
    pub fn tcp_out(&self, within: Duration) -> Result<String> {
        self.guest.space().ask_tcp((INTERNET, PORT).into(), within)
    }

    /// The same over IPv6.
    ///
    /// # Errors
    /// Why it says nothing.
    pub fn tcp6_out(&self, within: Duration) -> Result<String> {
        self.guest.space().ask_tcp((INTERNET6, PORT).into(), within)
    }

    fn passes(&self, way: Way, within: Duration) -> Result<bool> {
        Ok(match way {
            Way::PingOut => self.guest.space().ping(IpAddr::V4(INTERNET), within)?,
            Way::TcpOut => self
                .tcp_out(within)
                .is_ok_and(|said| said.starts_with("hello-from-wan")),
            Way::TcpIn => {
                let said = self.machine.ask_tcp(self.guest.service(), within);
                said.is_ok_and(|said| said.starts_with("hello-from-guest"))
            }
        })
    }

    /// Asks until there is an answer.
    ///
    /// # Errors
    /// When there is none for [`ANSWER`].
    pub fn answers(&self, way: Way) -> Result<()> {
        soon(&format!("{way:?}, {ANSWER:?}"), |within| self.passes(way, within))
    }

    /// Asks and hears nothing.
    ///
    /// # Errors
    /// When there is an answer.
    pub fn is_silent(&self, way: Way) -> Result<()> {
        ensure!(!self.passes(way, SILENCE)?, "{way:?} passes");
        Ok(())
    }

    /// All of the machine that is not ours.
    ///
    /// # Errors
    /// When a program fails.
    pub fn foreign_state(&self, is_ours: impl Fn(&str) -> bool) -> Result<State> {
        self.machine.foreign_state(is_ours)
    }
}

fn links(machine: &Space, internet: &Space, peer: &Space) -> Result<()> {
    let (outside, beside) = (internet.pid(), peer.pid());
    machine.ip(&format!(
        "link add eth0 type veth peer name eth0_gw netns {outside}\n\
         link add eth1 type veth peer name isp1 netns {outside}\n"
    ))?;
    internet.ip(&format!(
        "link add peer_gw type veth peer name eth0 netns {beside}\n\
         link add lan0 type bridge\nlink set eth0_gw master lan0\nlink set peer_gw master lan0\n\
         link set eth0_gw up\nlink set peer_gw up\nlink set lan0 up\nlink set isp1 up\n\
         address add 10.1.0.1/24 dev lan0\naddress add fd10:1::1/64 dev lan0 nodad\n\
         address add 10.2.0.1/24 dev isp1\naddress add fd10:2::1/64 dev isp1 nodad\n\
         address add {INTERNET}/32 dev lo\naddress add {INTERNET6}/128 dev lo nodad\n"
    ))?;
    peer.ip(&format!(
        "address add {PEER}/24 dev eth0\naddress add fd10:1::9/64 dev eth0 nodad\nlink set eth0 up\n\
         route add default via 10.1.0.1\n-6 route add default via fd10:1::1\n"
    ))?;
    for (nic, metric) in [(Nic::Eth0, BETTER), (Nic::Eth1, WORSE)] {
        let net = nic.number();
        machine.ip(&format!(
            "address add {}/24 dev {nic}\naddress add fd10:{net}::2/64 dev {nic} nodad\nlink set {nic} up\n{}",
            nic.address(),
            nic.routes("add", metric)
        ))?;
    }
    has_addresses(machine)
}

/// The kernel makes an address of IPv6 one of the machine's a moment after it took it.
fn has_addresses(machine: &Space) -> Result<()> {
    let until = Instant::now() + ANSWER;
    loop {
        let local = machine.sh("ip -6 route show table local")?;
        if ["fd10:1::2 ", "fd10:2::2 "].iter().all(|own| local.contains(own)) {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{local}");
    }
}
