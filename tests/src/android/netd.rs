//! What netd keeps: rules, routes and chains, by its own numbers.

use std::fmt;

use anyhow::Result;

use crate::space::Space;

/// A phone's `iptables` is the legacy one, whatever the machine of the tests prefers.
pub(super) const PROGRAMS: [(&str, &str); 6] = [
    ("iptables", "/usr/sbin/iptables-legacy"),
    ("iptables-save", "/usr/sbin/iptables-legacy-save"),
    ("iptables-restore", "/usr/sbin/iptables-legacy-restore"),
    ("ip6tables", "/usr/sbin/ip6tables-legacy"),
    ("ip6tables-save", "/usr/sbin/ip6tables-legacy-save"),
    ("ip6tables-restore", "/usr/sbin/ip6tables-legacy-restore"),
];

/// A network that may be the default one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Uplink {
    /// Wi-Fi, netId 100.
    #[default]
    Wlan0,
    /// Cellular, netId 101.
    Rmnet1,
}

impl fmt::Display for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wlan0 => "wlan0",
            Self::Rmnet1 => "rmnet1",
        })
    }
}

/// Whether an app's secure VPN is up, netId 102.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Vpn {
    /// It is not.
    #[default]
    Off,
    /// It is, for all apps.
    On,
}

/// Which chains lead away from FORWARD.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Chains {
    /// Only netd's own.
    #[default]
    Netd,
    /// The vendor's `oem_fwd` before them, as AOSP's Controllers.cpp makes it.
    WithOem,
}

/// What netd remembers.
#[derive(Debug, Default)]
pub(super) struct Netd {
    pub(super) default: Uplink,
    pub(super) vpn: Vpn,
    pub(super) chains: Chains,
}

/// The tables of the networks: 1000 + the link's number; local routes of a network: 10^9 + that.
#[derive(Debug)]
pub(super) struct Tables {
    wlan: u64,
    cell: u64,
    vpn: u64,
    dummy: u64,
}

const LOCAL_ROUTES: u64 = 1_000_000_000 - 1000;

impl Tables {
    pub(super) fn of(machine: &Space) -> Result<Self> {
        let table = |link| machine.index(link).map(|index| 1000 + index);
        Ok(Self {
            wlan: table("wlan0")?,
            cell: table("rmnet1")?,
            vpn: table("tun1")?,
            dummy: table("dummy0")?,
        })
    }

    pub(super) fn of_uplink(&self, uplink: Uplink) -> u64 {
        match uplink {
            Uplink::Wlan0 => self.wlan,
            Uplink::Rmnet1 => self.cell,
        }
    }

    /// RouteController::Init: `flushRules` spares priority 0 only, not even the kernel's own 32766 and 32767.
    pub(super) fn make_rules(&self, machine: &Space, netd: &Netd) -> Result<()> {
        let rules = machine.ip_json("rule show")?;
        let priorities = rules.iter().filter_map(|rule| rule["priority"].as_u64());
        let mut lines: String = priorities
            .filter(|priority| *priority != 0)
            .map(|priority| format!("rule del pref {priority}\n"))
            .collect();
        lines += &self.ladder();
        lines += &self.default_rules(netd.default);
        if netd.vpn == Vpn::On {
            lines += &self.vpn_rules("add");
        }
        machine.ip(&lines)?;
        for uplink in [Uplink::Wlan0, Uplink::Rmnet1] {
            if is_up(machine, uplink)? {
                self.fill(machine, uplink)?;
            }
        }
        machine.ip(&format!(
            "route replace 10.99.0.0/24 dev tun1 table {vpn}\n\
             route replace default dev tun1 via 10.99.0.1 table {vpn}\n\
             route replace default dev dummy0 table {dummy}\n",
            vpn = self.vpn,
            dummy = self.dummy,
        ))
    }

    /// What does not change with the default network or a VPN. netd adds at 21000 (TETHERING)
    /// `iif <downstream> lookup <upstream>` while the hotspot is on.
    fn ladder(&self) -> String {
        let Self {
            wlan, cell, dummy, ..
        } = self;
        format!(
            "rule add pref 10000 fwmark 0xc0000/0xd0000 lookup 99\n\
             rule add pref 11000 iif lo oif dummy0 uidrange 0-0 lookup {dummy}\n\
             rule add pref 11000 iif lo oif wlan0 uidrange 0-0 lookup {wlan}\n\
             rule add pref 11000 iif lo oif rmnet1 uidrange 0-0 lookup {cell}\n\
             rule add pref 16000 fwmark 0x10063/0x1ffff iif lo lookup 97\n\
             rule add pref 16000 fwmark 0x10064/0x1ffff iif lo lookup {wlan}\n\
             rule add pref 16000 fwmark 0x10065/0x1ffff iif lo lookup {cell}\n\
             rule add pref 17000 iif lo oif dummy0 lookup {dummy}\n\
             rule add pref 17000 iif lo oif wlan0 lookup {wlan}\n\
             rule add pref 17000 iif lo oif rmnet1 lookup {cell}\n\
             rule add pref 18000 fwmark 0x0/0x10000 lookup 99\n\
             rule add pref 19000 fwmark 0x0/0x10000 lookup 98\n\
             rule add pref 20000 fwmark 0x0/0x10000 lookup 97\n\
             rule add pref 23000 fwmark 0x64/0x1ffff iif lo lookup {wlan}\n\
             rule add pref 23000 fwmark 0x65/0x1ffff iif lo lookup {cell}\n\
             rule add pref 32000 unreachable\n"
        )
    }

    fn default_rules(&self, default: Uplink) -> String {
        let table = self.of_uplink(default);
        let local = table + LOCAL_ROUTES;
        format!(
            "rule add pref 26000 fwmark 0x0/0x10000 iif lo lookup {local}\n\
             rule add pref 31000 fwmark 0x0/0xffff iif lo lookup {table}\n"
        )
    }

    fn vpn_rules(&self, change: &str) -> String {
        let vpn = self.vpn;
        format!(
            "rule {change} pref 12000 iif tun1 lookup 97\n\
             rule {change} pref 13000 fwmark 0x0/0x20000 iif lo uidrange 0-99999 lookup {vpn}\n\
             rule {change} pref 13000 fwmark 0xc0066/0xcffff lookup {vpn}\n"
        )
    }

    pub(super) fn set_vpn(&self, machine: &Space, vpn: Vpn) -> Result<()> {
        machine.ip(&self.vpn_rules(if vpn == Vpn::On { "add" } else { "del" }))
    }

    /// netd adds the new default network's rules before it removes the old one's.
    pub(super) fn switch(&self, machine: &Space, from: Uplink, to: Uplink) -> Result<()> {
        if from == to {
            return Ok(());
        }
        let gone = self.default_rules(from).replace("rule add", "rule del");
        machine.ip(&(self.default_rules(to) + &gone))
    }

    /// The routes of a network: netd puts them into its tables, the kernel leaves the connected one in main.
    pub(super) fn fill(&self, machine: &Space, uplink: Uplink) -> Result<()> {
        let table = self.of_uplink(uplink);
        let local = table + LOCAL_ROUTES;
        let (subnet, gateway) = match uplink {
            Uplink::Wlan0 => ("10.0.0.0/24", "10.0.0.1"),
            Uplink::Rmnet1 => ("10.64.0.0/29", "10.64.0.1"),
        };
        machine.ip(&format!(
            "route replace {subnet} dev {uplink} table {table}\n\
             route replace default via {gateway} dev {uplink} table {table}\n\
             route replace {subnet} dev {uplink} table {local}\n"
        ))
    }
}

fn is_up(machine: &Space, uplink: Uplink) -> Result<bool> {
    let link = machine.ip_json(&format!("link show dev {uplink}"))?;
    let flags = link.first().and_then(|link| link["flags"].as_array());
    Ok(flags.into_iter().flatten().any(|flag| flag == "UP"))
}

/// Incoming packets are marked in mangle INPUT only; forwarded ones meet a DROP (TetherController::setDefaults).
pub(super) fn make_chains(machine: &Space, chains: Chains) -> Result<()> {
    let (oem, leads) = match chains {
        Chains::Netd => ("", ""),
        Chains::WithOem => (":oem_fwd - [0:0]\n", "-A FORWARD -j oem_fwd\n"),
    };
    let text = format!(
        "*filter\n{oem}:fw_FORWARD - [0:0]\n:bw_FORWARD - [0:0]\n:tetherctrl_FORWARD - [0:0]\n{leads}\
         -A FORWARD -j fw_FORWARD\n-A FORWARD -j bw_FORWARD\n-A FORWARD -j tetherctrl_FORWARD\n\
         -A tetherctrl_FORWARD -j DROP\nCOMMIT\n\
         *nat\n:tetherctrl_nat_POSTROUTING - [0:0]\n-A POSTROUTING -j tetherctrl_nat_POSTROUTING\nCOMMIT\n\
         *mangle\n:routectrl_mangle_INPUT - [0:0]\n-A INPUT -j routectrl_mangle_INPUT\n\
         -A routectrl_mangle_INPUT -i wlan0 -j MARK --set-xmark 0x30064/0xffefffff\n\
         -A routectrl_mangle_INPUT -i rmnet1 -j MARK --set-xmark 0x30065/0xffefffff\nCOMMIT\n"
    );
    machine.feed(&["iptables-restore"], &text).map(drop)
}
