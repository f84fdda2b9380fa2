//! Floor 2: what others did to a host's network is found and named, each in the network of a machine or a phone of ours.
//!
//! Everything is asked anew until it is so: rules, answers of the kernel and what the agent tells follow a change a moment
//! later.

use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sovereign_tests::android::{Phone, Uplink, Way as PhoneWay};
use sovereign_tests::lan::{Forwarded, GATEWAY, Lan, Nic, Way};
use sovereign_tests::net::{
    Agent, Filter, Findings, Hosted, Router as Seat, SOON, can_run, left_by_the_kernel as stays,
    until_stopped_by,
};
use sovereign_tests::net::{WANT, for_both, world};
use sovereign_tests::space::{Guest, SILENCE, State};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const FOUR: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host";
const BOTH: &str = "want 192.168.100.1/24,fd00:64::1/64 1500 sql=192.168.100.2 host";

fn on_linux(
    name: &str,
    filter: Filter,
    want: &str,
    before: impl FnOnce(&Lan) -> Result<()>,
    body: impl FnOnce(&mut Seat) -> Result<()>,
) -> Result<()> {
    Seat::run(AGENT, name, filter, want, before, body)
}

/// Asks until there is nothing to find.
fn well(agent: &mut Agent) -> Result<Findings> {
    Findings::until(agent, "nothing is found", |found| found.are(&[]))
}

fn has(found: &Findings, line: &str) -> Result<()> {
    let probes = found.probes();
    ensure!(probes.contains(&line), "no {line:?}: {probes:#?}");
    Ok(())
}

#[test]
fn where_all_is_well_nothing_is_found_and_each_way_names_its_rule() -> Result<()> {
    let want = format!("{BOTH} uplink=auto");
    on_linux(
        "well_linux",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            let bridge = seat.hosted.bridge();
            seat.leaves_by(Nic::Eth0)?;
            let found = well(seat.agent()?)?;
            let by = "by rule 32766: from all lookup main";
            for line in [
                format!(
                    "ip route get 1.1.1.1 from 192.168.100.2 iif {bridge}: default via 10.1.0.1 dev eth0 table main, {by}"
                ),
                format!(
                    "ip route get 192.168.100.2 from 1.1.1.1 iif eth0: 192.168.100.0/24 dev {bridge} table main, {by}"
                ),
                format!(
                    "ip route get 192.168.100.2 from 1.1.1.1 iif eth1: 192.168.100.0/24 dev {bridge} table main, {by}"
                ),
                format!("ip route get 192.168.100.2: 192.168.100.0/24 dev {bridge} table main, {by}"),
                format!(
                    "ip route get 2606:4700:4700::1111 from fd00:64::2 iif {bridge}: default via fd10:1::1 dev eth0 table main, {by}"
                ),
                format!(
                    "ip route get fd00:64::2 from 2606:4700:4700::1111 iif eth0: fd00:64::/64 dev {bridge} table main, {by}"
                ),
                format!("ip route get fd00:64::2: fd00:64::/64 dev {bridge} table main, {by}"),
            ] {
                has(&found, &line)?;
            }
            let told = seat.agent()?.last("stopped ");
            ensure!(told.is_none(), "{told:?}");
            Ok(())
        },
    )
}

#[test]
fn a_named_uplink_has_rules_of_our_own_and_they_are_named() -> Result<()> {
    let want = format!("{FOUR} uplink=eth1");
    on_linux(
        "well_named",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            let (bridge, table) = (seat.hosted.bridge(), seat.hosted.table());
            seat.leaves_by(Nic::Eth1)?;
            let found = well(seat.agent()?)?;
            for line in [
                format!(
                    "ip route get 1.1.1.1 from 192.168.100.2 iif {bridge}: default via 10.2.0.1 dev eth1 table {table}, by rule 9010: from all iif {bridge} lookup {table}"
                ),
                format!(
                    "ip route get 192.168.100.2 from 1.1.1.1 iif eth1: 192.168.100.0/24 dev {bridge} table {table}, by rule 9000: from all to 192.168.100.0/24 lookup {table}"
                ),
                format!(
                    "ip route get 192.168.100.2: 192.168.100.0/24 dev {bridge} table {table}, by rule 9000: from all to 192.168.100.0/24 lookup {table}"
                ),
            ] {
                has(&found, &line)?;
            }
            Ok(())
        },
    )
}

#[test]
fn dockers_drop_is_named_with_what_helps_and_the_condition_goes_back() -> Result<()> {
    let want = format!("{BOTH} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    on_linux("found_docker", Filter::Owned, &want, Lan::docker, |seat| {
        let told = until_stopped_by(seat.agent()?, |line| line.contains("Filter ForwardDrop"))?;
        ensure!(
            told.contains("policy DROP of chain FORWARD of table ip filter"),
            "{told}"
        );
        let is_it = |found: &Findings| {
            let codes = found.codes();
            codes.contains(&"ForwardDrop v4".to_owned()) && codes.iter().all(|code| code.ends_with(" v4"))
        };
        let found = Findings::until(seat.agent()?, "Docker is named", is_it)?;
        seat.lan.is_silent(Way::PingOut)?;
        let text = found.text("ForwardDrop")?;
        for part in [
            "what guests send elsewhere",
            "answers to guests",
            "connections to forwarded ports",
        ] {
            ensure!(text.contains(part), "{text}");
        }
        // What the finding says helps.
        let fix = found.finding("ForwardDrop")?["fix"]
            .as_str()
            .context("no fix")?
            .to_owned();
        ensure!(fix.contains("DOCKER-USER"), "{fix}");
        seat.lan.machine().sh(&fix)?;
        seat.leaves_by(Nic::Eth0)?;
        well(seat.agent()?)?;
        until_stopped_by(seat.agent()?, |line| line == "stopped ")?;
        seat.lan.machine().sh(&fix.replace("-I", "-D"))?;
        until_stopped_by(seat.agent()?, |line| line.contains("ForwardDrop")).map(drop)
    })
}

#[test]
fn beside_docker_chains_of_ours_come_first_and_nothing_is_found() -> Result<()> {
    let want = format!("{FOUR} uplink=auto");
    on_linux("docker_no_harm", Filter::Iptables, &want, Lan::docker, |seat| {
        seat.leaves_by(Nic::Eth0)?;
        well(seat.agent()?).map(drop)
    })
}

#[test]
fn firewallds_refusal_is_told_without_a_question_and_goes_with_it() -> Result<()> {
    let want = format!("{BOTH} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    on_linux(
        "found_firewalld",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            seat.leaves_by(Nic::Eth0)?;
            for _ in 0..2 {
                seat.lan.firewalld_reload(Forwarded::Refused)?;
                until_stopped_by(seat.agent()?, |line| {
                    line.contains("Filter ForwardDrop") && line.contains("table inet firewalld")
                })?;
                let both = |found: &Findings| {
                    let codes = found.codes();
                    ["ForwardDrop v4", "ForwardDrop v6"]
                        .iter()
                        .all(|code| codes.iter().any(|c| c == code))
                };
                let found = Findings::until(seat.agent()?, "firewalld is named for both families", both)?;
                let text = found.text("ForwardDrop")?;
                // Its exception for translated connections lets forwards in, and answers come in.
                ensure!(text.contains("what guests send elsewhere"), "{text}");
                ensure!(
                    !text.contains("forwarded ports") && !text.contains("answers"),
                    "{text}"
                );
                ensure!(text.contains("firewall-cmd"), "{text}");
                seat.lan.firewalld_reload(Forwarded::Accepted)?;
                until_stopped_by(seat.agent()?, |line| line == "stopped ")?;
                well(seat.agent()?)?;
            }
            seat.lan.machine().sh("nft delete table inet firewalld").map(drop)
        },
    )
}

#[test]
fn what_cannot_be_followed_may_stop_guests_and_no_condition_says_that_it_does() -> Result<()> {
    let want = format!("{FOUR} uplink=auto");
    on_linux(
        "may_drop",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            let bridge = seat.hosted.bridge();
            seat.leaves_by(Nic::Eth0)?;
            let nft = |seat: &Seat, text: &str| seat.lan.machine().feed(&["nft", "-f", "-"], text).map(drop);
            let chain = format!(
                "table ip admin {{\nchain through {{ type filter hook forward priority 5; policy accept;\n\
             iifname {{ \"lo\", \"{bridge}x\" }} drop\n}}\n}}\n"
            );
            nft(seat, &chain)?;
            let found = Findings::until(seat.agent()?, "it may stop them", |found| {
                found.are(&["ForwardMayDrop v4"])
            })?;
            ensure!(found.finding("ForwardMayDrop")?["stops"] == false);
            let told = seat.agent()?.last("stopped ");
            ensure!(told.is_none(), "{told:?}");
            // A rule about some ports only, or about others, is somebody's will and no finding.
            let some = "flush chain ip admin through\nadd rule ip admin through tcp dport 25 drop\n\
            add rule ip admin through ip saddr 10.77.0.0/16 drop\nadd rule ip admin through ct state invalid drop\n";
            nft(seat, some)?;
            well(seat.agent()?)?;
            seat.lan.machine().sh("nft delete table ip admin").map(drop)
        },
    )
}

#[test]
fn a_strict_reverse_path_is_named_where_it_drops_what_is_for_guests() -> Result<()> {
    let set = |seat: &Seat, link: &str, to: &str| {
        seat.lan
            .machine()
            .set_sysctl(&format!("net.ipv4.conf.{link}.rp_filter"), to)
    };
    let before = |lan: &Lan| {
        for link in ["all", "eth0", "eth1"] {
            lan.machine()
                .set_sysctl(&format!("net.ipv4.conf.{link}.rp_filter"), "0")?;
        }
        Ok(())
    };
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    on_linux("reverse_path", Filter::Owned, &want, before, |seat| {
        seat.leaves_by(Nic::Eth0)?;
        well(seat.agent()?)?;
        for strict in ["eth1", "all"] {
            set(seat, strict, "1")?;
            let found = Findings::until(seat.agent()?, "it is named", |found| {
                found.are(&["StrictReversePath v4"])
            })?;
            let finding = found.finding("StrictReversePath")?;
            ensure!(
                finding["stops"] == false && finding["subject"] == "IPv4 eth1",
                "{finding:#}"
            );
            // What the finding says helps: the larger of both counts, and 2 is loose.
            seat.lan
                .machine()
                .sh(finding["fix"].as_str().context("no fix")?)?;
            well(seat.agent()?)?;
            set(seat, "all", "0")?;
            set(seat, "eth1", "0")?;
        }
        // Strict where answers leave.
        set(seat, "eth0", "1")?;
        well(seat.agent()?)?;
        set(seat, "eth0", "0")
    })?;
    // A named uplink has a rule of ours, which the kernel asks for the way back as well: strict is no harm there.
    let want = format!("{FOUR} uplink=eth1");
    on_linux("reverse_path_named", Filter::Owned, &want, before, |seat| {
        set(seat, "eth1", "1")?;
        seat.leaves_by(Nic::Eth1)?;
        well(seat.agent()?)?;
        set(seat, "eth1", "0")
    })
}

/// Programs of iptables without the table mangle, as kernels have them that were built without it.
fn without_mangle(lan: &mut Lan, dir: &std::path::Path) -> Result<()> {
    let mut links = Vec::new();
    for name in [
        "iptables-save",
        "iptables-restore",
        "ip6tables-save",
        "ip6tables-restore",
    ] {
        let path = dir.join(name);
        let real = format!("/usr/sbin/{}", name.replace("tables-", "tables-nft-"));
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *mangle*) echo 'no table mangle' >&2; exit 3;; esac\nexec {real} \"$@\"\n"
        );
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        links.push((name, path.to_string_lossy().into_owned()));
    }
    let links: Vec<(&str, &str)> = links.iter().map(|(name, path)| (*name, path.as_str())).collect();
    lan.machine_mut().prefer(&links)
}

#[test]
fn a_narrow_way_out_is_named_where_nothing_clamps() -> Result<()> {
    let want = format!("{FOUR} uplink=auto");
    let narrow = |lan: &Lan, mtu: u32| lan.machine().ip(&format!("link set eth0 mtu {mtu}\n"));
    on_linux(
        "narrow_clamped",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            narrow(&seat.lan, 1400)?;
            seat.leaves_by(Nic::Eth0)?;
            well(seat.agent()?)?;
            narrow(&seat.lan, 1500)
        },
    )?;
    if !can_run("narrow_unclamped") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut lan = Lan::new()?;
    without_mangle(&mut lan, dir.path())?;
    let hosted = Hosted::new(AGENT, Filter::Iptables)?;
    let mut agent = hosted.up(lan.machine(), &want)?;
    lan.plug(&hosted.bridge())?;
    well(&mut agent)?;
    narrow(&lan, 1400)?;
    let found = Findings::until(&mut agent, "it is named", |found| found.are(&["MtuBlackHole v4"]))?;
    let text = found.text("MtuBlackHole")?;
    ensure!(text.contains("link eth0 has mtu 1400"), "{text}");
    // A guest that was told so sends what fits.
    Findings::until_with(&mut agent, "sql=1400", "it is no harm", |found| found.are(&[]))?;
    narrow(&lan, 1500)?;
    well(&mut agent)?;
    // The same by a route.
    lan.machine()
        .ip("route replace default via 10.1.0.1 dev eth0 proto dhcp metric 100 mtu 1300\n")?;
    let found = Findings::until(&mut agent, "the route is named", |found| {
        found.are(&["MtuBlackHole v4"])
    })?;
    ensure!(
        found.text("MtuBlackHole")?.contains("carries 1300"),
        "{:#}",
        found.0
    );
    hosted.down(lan.machine(), agent)
}

#[test]
fn others_in_the_guests_subnet_are_named() -> Result<()> {
    let want = format!("{FOUR} uplink=auto");
    on_linux(
        "address_conflicts",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            seat.leaves_by(Nic::Eth0)?;
            let machine = |seat: &Seat, line: &str| seat.lan.machine().ip(line);
            machine(seat, "route add 192.168.100.2/32 via 10.1.0.9 dev eth0\n")?;
            let found = Findings::until(seat.agent()?, "a route is named", |found| {
                found.are(&["RouteConflict v4"])
            })?;
            let text = found.text("RouteConflict")?;
            ensure!(text.contains("192.168.100.2/32 via 10.1.0.9 dev eth0"), "{text}");
            machine(seat, "route del 192.168.100.2/32 via 10.1.0.9 dev eth0\n")?;
            well(seat.agent()?)?;
            machine(seat, "address add 192.168.100.77/24 dev eth1\n")?;
            let is_it = |found: &Findings| found.codes().contains(&"AddressConflict all".to_owned());
            let found = Findings::until(seat.agent()?, "an address is named", is_it)?;
            let text = found.text("AddressConflict")?;
            ensure!(text.contains("link eth1 has 192.168.100.77/24"), "{text}");
            machine(seat, "address del 192.168.100.77/24 dev eth1\n")?;
            well(seat.agent()?)?;
            seat.leaves_by(Nic::Eth0)
        },
    )
}

#[test]
fn frames_between_guests_that_forward_drops_are_named() -> Result<()> {
    const CALLS: &str = "net.bridge.bridge-nf-call-iptables";
    let want = format!("{FOUR} uplink=auto");
    on_linux("br_netfilter", Filter::Owned, &want, Lan::docker, |seat| {
        let machine = seat.lan.machine();
        if machine.sysctl(CALLS).is_err() {
            eprintln!("SKIPPED: frames between guests (this kernel has no br_netfilter)");
            return Ok(());
        }
        let sibling = Guest::new(machine, "vm_web", "192.168.100.3/24", &GATEWAY.to_string())?;
        sibling.plug(machine, &seat.hosted.bridge())?;
        let reaches = |seat: &Seat, within| seat.lan.guest().space().ping("192.168.100.3".parse()?, within);
        machine.set_sysctl(CALLS, "1")?;
        let is_it = |found: &Findings| found.codes().contains(&"BridgeFiltered v4".to_owned());
        let found = Findings::until(seat.agent()?, "it is named", is_it)?;
        ensure!(!reaches(seat, SILENCE)?, "they reach each other");
        let fix = found.finding("BridgeFiltered")?["fix"]
            .as_str()
            .context("no fix")?;
        seat.lan.machine().sh(fix)?;
        Findings::until(seat.agent()?, "it is gone", |found| !is_it(found))?;
        let begun = Instant::now();
        while !reaches(seat, SILENCE)? {
            ensure!(begun.elapsed() < SOON, "they do not reach each other");
        }
        seat.lan.machine().set_sysctl(CALLS, "1") // as a fresh namespace has it
    })
}

#[test]
fn a_tap_that_no_machine_holds_is_named() -> Result<()> {
    let want = format!("{FOUR} uplink=auto");
    on_linux(
        "no_carrier",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            let agent = seat.agent()?;
            let found =
                Findings::until_with(agent, "sql", "it is named", |found| found.are(&["NoCarrier all"]))?;
            ensure!(found.text("NoCarrier")?.contains("NO-CARRIER"));
            agent.say("open sql")?;
            agent.expect("opened sql")?;
            Findings::until_with(agent, "sql", "it is gone", |found| found.are(&[]))?;
            agent.say("close sql")?;
            Findings::until_with(agent, "sql", "it is back", |found| found.are(&["NoCarrier all"]))?;
            Findings::until(agent, "nobody should hold it", |found| found.are(&[])).map(drop)
        },
    )
}

#[test]
fn a_port_that_somebody_else_takes_is_named() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    on_linux(
        "port_taken",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            seat.forward_works("10.1.0.2:15432")?;
            well(seat.agent()?)?;
            let rule = "PREROUTING -p tcp --dport 15000:15999 -j DNAT --to-destination 10.1.0.77";
            seat.lan.machine().sh(&format!("iptables -t nat -A {rule}"))?;
            let found = Findings::until(seat.agent()?, "it is named", |found| found.are(&["PortTaken v4"]))?;
            ensure!(found.text("PortTaken")?.contains("15432"));
            seat.lan.machine().sh(&format!("iptables -t nat -D {rule}"))?;
            well(seat.agent()?).map(drop)
        },
    )
}

/// Has leftovers of these names removed; what was, as one text.
fn remove(agent: &mut Agent, names: &str) -> Result<String> {
    agent.say(&format!("remove {names}"))?;
    agent.expect("removal ")
}

/// Nothing of a space is other than these lines say.
fn differs_by(before: &State, after: &State, lines: &[&str]) -> Result<()> {
    let difference = before.difference(after);
    ensure!(difference == lines, "{difference:#?}");
    Ok(())
}

#[test]
fn what_scripts_left_goes_by_its_name_and_nothing_else_does() -> Result<()> {
    let want = format!("{FOUR} uplink=eth1");
    on_linux(
        "leftovers",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            let bridge = seat.hosted.bridge();
            seat.leaves_by(Nic::Eth1)?;
            let accept = format!("iptables -A FORWARD -i {bridge} -j ACCEPT");
            let hide = "iptables -t nat -A POSTROUTING -s 192.168.100.0/24 -j MASQUERADE";
            let other = "iptables -A FORWARD -i docker0 -j ACCEPT"; // twice, and none of ours
            let machine = |seat: &Seat, line: &str| seat.lan.machine().sh(line).map(drop);
            machine(seat, &format!("{accept}; {hide}; {other}; {other}"))?;
            let single = seat.lan.foreign_state(|_| false)?;
            machine(seat, &format!("{accept}; {accept}; {hide}"))?;
            let piled = seat.lan.foreign_state(|_| false)?;
            machine(seat, "ip rule add pref 1 lookup main")?;

            let codes = ["LookupMain v4", "DuplicateRules v4"];
            let found = Findings::until(seat.agent()?, "both are found", |found| found.are(&codes))?;
            ensure!(
                found.leftovers() == ["rule-lookup-main", "duplicate-rules"],
                "{:#}",
                found.0
            );
            ensure!(
                found.finding("LookupMain")?["stops"] == true,
                "guests leave by eth0: {:#}",
                found.0
            );
            until_stopped_by(seat.agent()?, |line| line.contains("Routing LookupMain"))?;

            // A name that is not there changes nothing, whatever else is asked for.
            let before = seat.lan.foreign_state(|_| false)?;
            seat.agent()?.say("remove rule-lookup-main default-in-main")?;
            let refused = seat.agent()?.expect("not-removed")?;
            ensure!(
                refused.contains("\"default-in-main\"")
                    && refused.contains("rule-lookup-main, duplicate-rules"),
                "{refused}"
            );
            seat.agent()?.say("remove-dry rule-lookup-main duplicate-rules")?;
            let told = seat.agent()?.expect("removal ")?;
            ensure!(
                told.contains("IPv4 rule 1: from all lookup main: remove"),
                "{told}"
            );
            ensure!(
                told.contains("3 times") && told.contains("2 times") && !told.contains("docker0"),
                "{told}"
            );
            differs_by(&before, &seat.lan.foreign_state(|_| false)?, &[])?;

            remove(seat.agent()?, "rule-lookup-main")?;
            let begun = Instant::now();
            while seat.agent()?.last("removed IPv4 rule 1").is_none() {
                ensure!(begun.elapsed() < SOON, "the removal is not told");
            }
            Findings::until(seat.agent()?, "the rule is gone", |found| {
                found.are(&["DuplicateRules v4"])
            })?;
            until_stopped_by(seat.agent()?, |line| line == "stopped ")?;
            differs_by(&piled, &seat.lan.foreign_state(|_| false)?, &[])?;
            let removal = remove(seat.agent()?, "duplicate-rules")?;
            ensure!(removal.contains("\"failed\":[]"), "{removal}");
            well(seat.agent()?)?;
            differs_by(&single, &seat.lan.foreign_state(|_| false)?, &[])?;
            seat.leaves_by(Nic::Eth1)?;
            machine(
                seat,
                &format!("{accept}; {hide}; {other}; {other}").replace("-A ", "-D "),
            )
        },
    )
}

#[test]
fn on_a_phone_what_scripts_left_goes_and_what_is_netds_stays() -> Result<()> {
    if !can_run("phone_leftovers") {
        return Ok(());
    }
    let phone = Phone::new()?;
    phone
        .machine()
        .sh("for table in filter nat mangle; do ip6tables-save -t $table; done")?;
    let hosted = Hosted::new(AGENT, Filter::Iptables)?;
    let before = phone.foreign_state(stays)?;
    let mut agent = hosted.up(phone.machine(), &format!("{FOUR} uplink=auto"))?;
    let outcome = phone_leftovers(&phone, &hosted, &mut agent);
    if outcome.is_err() {
        eprintln!(
            "{}\n{}",
            hosted.log(),
            phone.machine().sh("ip rule; ip route; iptables-save")?
        );
        return outcome;
    }
    hosted.down(phone.machine(), agent)?;
    let left = before.difference(&phone.foreign_state(stays)?);
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

fn phone_leftovers(phone: &Phone, hosted: &Hosted, agent: &mut Agent) -> Result<()> {
    let bridge = hosted.bridge();
    phone.plug(&bridge)?;
    phone.answers(PhoneWay::PingOut)?;
    let table = phone.table(Uplink::Wlan0);
    let way_out = format!(
        "ip route get 1.1.1.1 from 192.168.100.2 iif {bridge}: default via 10.0.0.1 dev wlan0 table {table}, \
         by rule 9010: from all iif {bridge} lookup {table}"
    );
    let ours = hosted.table();
    let way_in = format!(
        "ip route get 192.168.100.2 from 1.1.1.1 iif wlan0: 192.168.100.0/24 dev {bridge} table {ours}, \
         by rule 9000: from all to 192.168.100.0/24 lookup {ours}"
    );
    let is_well = |found: &Findings| {
        let probes = found.probes();
        found.are(&[]) && probes.contains(&way_out.as_str()) && probes.contains(&way_in.as_str())
    };
    Findings::until(agent, "all is well, by our rules", is_well)?;
    let clean = phone.foreign_state(|_| false)?;

    phone.machine().ip("rule add pref 1 lookup main\n")?;
    let found = Findings::until(agent, "the rule is found", |found| found.are(&["LookupMain v4"]))?;
    ensure!(
        found.finding("LookupMain")?["stops"] == false,
        "alone it harms nobody: {:#}",
        found.0
    );
    phone.answers(PhoneWay::PingOut)?;

    phone
        .machine()
        .ip("route add default via 10.64.0.1 dev rmnet1\n")?;
    let both = |found: &Findings| found.are(&["LookupMain v4", "DefaultInMain v4"]);
    let found = Findings::until(agent, "both are found", both)?;
    ensure!(
        found.finding("LookupMain")?["stops"] == true,
        "guests leave by rmnet1: {:#}",
        found.0
    );
    let astray = "dev rmnet1 table main, by rule 1: from all lookup main";
    ensure!(
        found.probes().iter().any(|probe| probe.contains(astray)),
        "{:#?}",
        found.probes()
    );
    until_stopped_by(agent, |line| line.contains("Routing LookupMain"))?;

    let removal = remove(agent, "default-in-main")?;
    ensure!(
        removal.contains("route default via 10.64.0.1 dev rmnet1, table main: remove"),
        "{removal}"
    );
    Findings::until(agent, "the rule is left", |found| found.are(&["LookupMain v4"]))?;
    remove(agent, "rule-lookup-main")?;
    Findings::until(agent, "all is well again, by our rules", is_well)?;
    until_stopped_by(agent, |line| line == "stopped ")?;
    differs_by(&clean, &phone.foreign_state(|_| false)?, &[])?;
    phone.answers(PhoneWay::PingOut)
}

/// In a namespace of our own nobody else is to be met; it is looked at through its helper all the same.
#[test]
fn a_private_network_is_looked_at_through_its_helper() -> Result<()> {
    for_both("private_findings", |user| {
        let (world, links) = world(AGENT, user)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        let found = Findings::until_with(&mut agent, "sql", "its TAP is named", |found| {
            found.are(&["NoCarrier all"])
        })?;
        ensure!(found.text("NoCarrier")?.contains(&links.sql), "{:#}", found.0);
        let by = format!(
            "192.168.100.0/24 dev {} table main, by rule 32766: from all lookup main",
            links.bridge
        );
        let probes = found.probes();
        ensure!(probes.len() == 1 && probes[0].ends_with(&by), "{probes:#?}");
        well(&mut agent).map(drop)
    })
}
