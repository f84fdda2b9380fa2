//! A phone: Android's netd with its rule ladder, chains and sysctls, rebuilt in private namespaces.
//!
//! ```text
//!  guest ns             phone ns                                     internet ns
//!  eth0 192.168.100.2 -- vm_sql, a port of any bridge
//!                        wlan0  10.0.0.5/24 ------------------------ wlan_gw 10.0.0.1  8.8.8.8 on lo
//!                        rmnet1 10.64.0.5/29 ----------------------- cell_gw 10.64.0.1
//!                        tun1   10.99.0.2/24 (an app's VPN) -------- vpn_gw  10.99.0.1
//! ```
//!
//! Sources of the ladder: AOSP system/netd server/RouteController.{h,cpp} and the `ip rule` of a Pixel 7a (lynx). All
//! assertions of the lab (tests/tests/android_ground.rs) hold here, with hand-made rules.
//!
//! **With an agent in the place of hand-made rules**: [`Phone::new`] is a phone that is up, with netd's state and
//! without anything of ours. Start the agent with [`Phone::machine`]`.command(..)`, which runs inside the phone's
//! network namespace as root, with a private /run, and finds Android's (legacy) programs under the name `iptables`.
//! Wait until its bridge is there, then [`Phone::plug`] the guest into it: its address is [`GUEST`], its gateway
//! [`GATEWAY`], so the agent's subnet is [`SUBNET`]. Then for each scenario: disturb ([`Phone::netd_restart`],
//! [`Phone::hotspot_off`], [`Phone::switch_default`], [`Phone::link_down`], [`Phone::set_vpn`]), assert
//! [`Phone::answers`] or [`Phone::is_silent`] and [`Phone::route_of`]; and take [`Phone::foreign_state`] before
//! `up` and after `down`: its [`difference`](crate::space::State::difference) must be empty. The kernel here has
//! nf_tables, which a phone's has not: tell the agent to take iptables.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};

pub use crate::space::Way;
use crate::space::{ANSWER, Guest, SILENCE, Service, Space, State, soon};

mod netd;

pub use netd::{Chains, Uplink, Vpn};
use netd::{Netd, Tables};

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 2);
/// The phone's own address on the guests' bridge.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 100, 1);
/// The guests' subnet.
pub const SUBNET: &str = "192.168.100.0/24";
/// A machine on the internet, with a TCP service at [`INTERNET_PORT`].
pub const INTERNET: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// Says `hello-from-wan`, and whom it sees.
pub const INTERNET_PORT: u16 = 7777;
/// The link of the guest on the phone.
pub const PORT: &str = "vm_sql";

/// Who on the phone sends a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// A socket with this fwmark: one that chose its network has bit 16 and the network's id.
    Mark(u32),
    /// An app.
    Uid(u32),
}

/// A socket that chose the cellular network.
pub const CHOSE_CELLULAR: Sender = Sender::Mark(0x30065);
/// An app's socket that chose nothing.
pub const APP: Sender = Sender::Uid(10_123);

/// A phone that is up, its guest and the internet. Ends with all that is in it when dropped.
pub struct Phone {
    machine: Space,
    guest: Guest,
    internet: Space,
    tables: Tables,
    netd: Mutex<Netd>,
    _service: Service,
}

impl Phone {
    /// A phone on Wi-Fi without a VPN, with netd's state and nothing of ours. Needs root.
    ///
    /// # Errors
    /// The system's own.
    pub fn new() -> Result<Self> {
        let mut machine = Space::new()?;
        machine.prefer(&netd::PROGRAMS)?;
        let internet = Space::new()?;
        let guest = Guest::new(&machine, PORT, &format!("{GUEST}/24"), &GATEWAY.to_string())?;
        links(&machine, &internet)?;
        let service = internet.serve_tcp((INTERNET, INTERNET_PORT).into(), "hello-from-wan")?;
        let phone = Self {
            tables: Tables::of(&machine)?,
            machine,
            guest,
            internet,
            netd: Mutex::default(),
            _service: service,
        };
        phone.netd_restart()?;
        Ok(phone)
    }

    /// The phone itself.
    #[must_use]
    pub fn machine(&self) -> &Space {
        &self.machine
    }

    /// The guest.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The other side of all uplinks, which is also the LAN of `wlan0`.
    #[must_use]
    pub fn internet(&self) -> &Space {
        &self.internet
    }

    /// Makes the guest a port of this bridge.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn plug(&self, bridge: &str) -> Result<()> {
        self.guest.plug(&self.machine, bridge)
    }

    /// The routing table of an uplink, as netd numbers it.
    #[must_use]
    pub fn table(&self, uplink: Uplink) -> u64 {
        self.tables.of_uplink(uplink)
    }

    /// What netd does to rules and routes when it starts: all go but priority 0, then its own are made.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn netd_rules(&self, default: Uplink, vpn: Vpn) -> Result<()> {
        let mut netd = self.netd();
        (netd.default, netd.vpn) = (default, vpn);
        self.tables.make_rules(&self.machine, &netd)
    }

    /// What netd does to iptables when it starts: its chains are made anew, everything else in them is gone.
    ///
    /// # Errors
    /// With what `iptables-restore` said.
    pub fn netd_iptables(&self, chains: Chains) -> Result<()> {
        self.netd().chains = chains;
        netd::make_chains(&self.machine, chains)
    }

    /// netd crashes and comes back: rules, chains, and forwarding off.
    ///
    /// # Errors
    /// With what a program said.
    pub fn netd_restart(&self) -> Result<()> {
        let netd = self.netd();
        self.tables.make_rules(&self.machine, &netd)?;
        netd::make_chains(&self.machine, netd.chains)?;
        self.hotspot_off()
    }

    /// The user switches the hotspot off: netd turns forwarding off.
    ///
    /// # Errors
    /// The system's own.
    pub fn hotspot_off(&self) -> Result<()> {
        self.machine.set_sysctl("net.ipv4.ip_forward", "0")
    }

    /// netd takes another network as the default one; the links stay as they are.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn switch_default(&self, to: Uplink) -> Result<()> {
        let mut netd = self.netd();
        self.tables.switch(&self.machine, netd.default, to)?;
        netd.default = to;
        Ok(())
    }

    /// A VPN app connects or disconnects.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn set_vpn(&self, vpn: Vpn) -> Result<()> {
        let mut netd = self.netd();
        if netd.vpn != vpn {
            self.tables.set_vpn(&self.machine, vpn)?;
        }
        netd.vpn = vpn;
        Ok(())
    }

    /// A link goes down; the kernel removes its routes without telling of each.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn link_down(&self, uplink: Uplink) -> Result<()> {
        self.machine.ip(&format!("link set {uplink} down\n"))
    }

    /// A link comes back, and netd fills its tables again.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn link_up(&self, uplink: Uplink) -> Result<()> {
        self.machine.ip(&format!("link set {uplink} up\n"))?;
        self.tables.fill(&self.machine, uplink)
    }

    /// By which link a packet of the phone's own leaves, or why not.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn route_of(&self, sender: Sender) -> Result<String> {
        self.machine.route(&match sender {
            Sender::Mark(mark) => format!("9.9.9.9 mark {mark:#x}"),
            Sender::Uid(uid) => format!("9.9.9.9 uid {uid}"),
        })
    }

    /// By which link a packet of the guest to the internet leaves, or why not.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn route_out(&self, bridge: &str) -> Result<String> {
        self.machine
            .route(&format!("{INTERNET} from {GUEST} iif {bridge}"))
    }

    /// By which link an answer to the guest leaves, or why not.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn route_back(&self, uplink: Uplink) -> Result<String> {
        self.machine
            .route(&format!("{GUEST} from {INTERNET} iif {uplink}"))
    }

    /// Whether one of the guest's echo requests to the internet is answered.
    ///
    /// # Errors
    /// The system's own.
    pub fn ping_out(&self, within: Duration) -> Result<bool> {
        self.guest.space().ping(IpAddr::V4(INTERNET), within)
    }

    /// What the internet's service says to the guest.
    ///
    /// # Errors
    /// Why it says nothing.
    pub fn tcp_out(&self, within: Duration) -> Result<String> {
        let to = SocketAddr::from((INTERNET, INTERNET_PORT));
        self.guest.space().ask_tcp(to, within)
    }

    /// What the guest's service says to a process of the phone, without a chosen source address.
    ///
    /// # Errors
    /// Why it says nothing.
    pub fn tcp_in(&self, within: Duration) -> Result<String> {
        self.machine.ask_tcp(self.guest.service(), within)
    }

    fn passes(&self, way: Way, within: Duration) -> Result<bool> {
        Ok(match way {
            Way::PingOut => self.ping_out(within)?,
            Way::TcpOut => self
                .tcp_out(within)
                .is_ok_and(|said| said.starts_with("hello-from-wan")),
            Way::TcpIn => self
                .tcp_in(within)
                .is_ok_and(|said| said.starts_with("hello-from-guest")),
        })
    }

    /// Asks until there is an answer.
    ///
    /// # Errors
    /// When there is none for [`ANSWER`].
    pub fn answers(&self, way: Way) -> Result<()> {
        let what = format!("{way:?}, {ANSWER:?}");
        soon(&what, |within| self.passes(way, within))
    }

    /// Asks and hears nothing.
    ///
    /// # Errors
    /// When there is an answer.
    pub fn is_silent(&self, way: Way) -> Result<()> {
        ensure!(!self.passes(way, SILENCE)?, "{way:?} passes");
        Ok(())
    }

    /// All of the phone that is not ours.
    ///
    /// # Errors
    /// When a program fails.
    pub fn foreign_state(&self, is_ours: impl Fn(&str) -> bool) -> Result<State> {
        self.machine.foreign_state(is_ours)
    }

    fn netd(&self) -> std::sync::MutexGuard<'_, Netd> {
        self.netd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn links(machine: &Space, internet: &Space) -> Result<()> {
    let outside = internet.pid();
    machine.ip(&format!(
        "link add wlan0 type veth peer name wlan_gw netns {outside}\n\
         link add rmnet1 type veth peer name cell_gw netns {outside}\n\
         link add tun1 type veth peer name vpn_gw netns {outside}\n\
         link add dummy0 type bridge\n\
         address add 10.0.0.5/24 dev wlan0\n\
         address add 10.64.0.5/29 dev rmnet1\n\
         address add 10.99.0.2/24 dev tun1\n\
         link set wlan0 up\nlink set rmnet1 up\nlink set tun1 up\nlink set dummy0 up\n"
    ))?; // not every kernel has CONFIG_DUMMY
    internet.ip(&format!(
        "address add 10.0.0.1/24 dev wlan_gw\n\
         address add 10.64.0.1/29 dev cell_gw\n\
         address add 10.99.0.1/24 dev vpn_gw\n\
         address add {INTERNET}/32 dev lo\n\
         link set wlan_gw up\nlink set cell_gw up\nlink set vpn_gw up\n"
    ))?;
    for link in ["all", "default", "wlan0", "rmnet1", "tun1", PORT] {
        machine.set_sysctl(&format!("net.ipv4.conf.{link}.rp_filter"), "0")?;
    }
    // system/core rootdir/init.rc: replies carry the mark of the packet they answer.
    machine.set_sysctl("net.ipv4.fwmark_reflect", "1")?;
    machine.set_sysctl("net.ipv4.tcp_fwmark_accept", "1")
}
