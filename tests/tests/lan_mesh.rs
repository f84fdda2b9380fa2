//! Floor 3: two real guests, of which one needs the other, on the LAN: another machine reads Miniflux through the kernel's
//! forward while its PostgreSQL is killed, stopped and moved.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sovereign_tests::client::http;
use sovereign_tests::machine::{Machine, SOON, until};
use sovereign_tests::net::can_run;

/// The port on the LAN.
const PORT: u16 = 18_080;
/// Where Miniflux keeps what it was started with.
const RUN: &str = "/run/sovereign/miniflux";
/// Between two requests of the other machine.
const PACE: Duration = Duration::from_millis(100);

#[test]
fn what_needs_a_service_of_another_guest_is_on_the_lan() -> Result<()> {
    if !can_run("lan_mesh") {
        return Ok(());
    }
    let machine = Machine::new()?;
    machine.instance.go_through(|_| Mesh { machine: &machine }.live())
}

struct Mesh<'m> {
    machine: &'m Machine,
}

impl Mesh<'_> {
    fn live(&self) -> Result<()> {
        let before = self.machine.state()?;
        let instance = &self.machine.instance;
        self.configure("192.168.100.20")?;
        instance.ok(&["up", "--timeout", "300"])?;
        self.both_are_ready("after `up`")?;
        self.the_lan_reads("after `up`")?;
        self.the_edge_is_shown()?;
        self.a_killed_postgres_is_an_error_and_no_silence()?;
        self.a_stopped_postgres_closes_the_port()?;
        self.another_address_changes_nothing_for_the_lan()?;
        instance.ok(&["down"])?;
        ensure!(self.machine.from_peer(PORT, SOON).is_err(), "nobody is there");
        let changed = before.difference(&self.machine.state()?);
        ensure!(changed.is_empty(), "{changed:#?}");
        ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
        Ok(())
    }

    fn configure(&self, sql: &str) -> Result<()> {
        self.machine.configure(&format!(
            "[guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\naddress = \"{sql}\"\n\
             [guest.sql.service.postgres]\nkind = \"postgres\"\n\n\
             [guest.web]\nmemory = \"256MiB\"\ndata = \"64MiB\"\naddress = \"192.168.100.30\"\n\
             [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n\
             [[guest.web.forward]]\nname = \"lan\"\nservice = \"miniflux\"\nlisten = \"0.0.0.0:{PORT}\"\n\
             via = \"kernel\"\n"
        ))
    }

    fn inside(&self, guest: &str, line: &str) -> Result<String> {
        let said = self
            .machine
            .instance
            .ok(&["exec", guest, "--", "sh", "-c", line])?;
        Ok(said.trim().to_owned())
    }

    /// Its process, which lives.
    fn miniflux(&self) -> Result<String> {
        self.inside("web", &format!("cat {RUN}/pid && kill -0 $(cat {RUN}/pid)"))
    }

    fn guests(&self) -> Result<(Value, Value)> {
        let instance = &self.machine.instance;
        Ok((instance.guest_named("sql")?, instance.guest_named("web")?))
    }

    fn both_are_ready(&self, when: &str) -> Result<()> {
        until(&format!("both are ready {when}"), || {
            let (sql, web) = self.guests()?;
            let ready = sql["ready"] == "True" && web["ready"] == "True";
            Ok((ready, format!("{sql:#}\n{web:#}")))
        })
    }

    /// One request of the other machine, which is answered or fails, and never hangs.
    fn get(&self, path: &str, basic: Option<&str>) -> Result<String> {
        http::get(self.machine.from_peer(PORT, SOON)?, path, basic)
    }

    /// Miniflux is well, and its first account can log in: both ask the database.
    fn the_lan_reads(&self, when: &str) -> Result<()> {
        let password = self.machine.instance.ok(&["secret", "web/miniflux"])?;
        let admin = format!("admin:{}", password.trim());
        until(&format!("the LAN reads {when}"), || {
            let health = self.get("/healthcheck", None)?;
            let me = self.get("/v1/me", Some(&admin))?;
            let good = health.ends_with("\r\n\r\nOK") && me.contains("\"username\":\"admin\"");
            Ok((good, format!("{health}\n{me}")))
        })?;
        ensure!(
            self.get("/v1/me", Some("admin:wrong")).is_err(),
            "anybody can log in"
        );
        Ok(())
    }

    /// In status, doctor and events.
    fn the_edge_is_shown(&self) -> Result<()> {
        let instance = &self.machine.instance;
        until("status shows the edge", || {
            let (sql, web) = self.guests()?;
            let edge = &web["requires"][0];
            let shown = edge["of"] == "sql/postgres"
                && edge["status"] == "True"
                && reason(&web, "miniflux.requires") == "Met"
                && reason(&sql, "postgres.web_miniflux") == "Granted"
                && reason(&web, "lan") == "Translated";
            Ok((shown, format!("{sql:#}\n{web:#}")))
        })?;
        until("doctor finds nothing, and knows the edge", || {
            let diagnosis = instance.doctor()?;
            let nothing = diagnosis["findings"].as_array().is_some_and(Vec::is_empty);
            let verdict = layer(&diagnosis, "web", "miniflux.requires")?["verdict"].clone();
            Ok((nothing && verdict == "holds", format!("{diagnosis:#}")))
        })?;
        until("events tell of the edge", || {
            let (waits, met) = (self.event(0, "WaitsFor")?, self.event(0, "Met")?);
            let told = waits.as_ref().is_some_and(|waits| {
                let of = waits["evidence"].as_str().unwrap_or_default();
                of.starts_with("sql/postgres ")
            });
            Ok((told && met.is_some(), format!("{waits:?} {met:?}")))
        })
    }

    /// The first of `web`'s events about the edge after a number, for this reason.
    fn event(&self, after: u64, reason: &str) -> Result<Option<Value>> {
        let events = self.machine.instance.events()?;
        Ok(events.into_iter().find(|event| {
            event["guest"] == "web"
                && event["subject"] == "miniflux.requires"
                && event["reason"] == reason
                && seq(event) > after
        }))
    }

    fn last_event(&self) -> Result<u64> {
        Ok(self.machine.instance.events()?.last().map_or(0, seq))
    }

    /// The other machine asks on while PostgreSQL dies: each request is answered, refused or cut, within its time.
    fn a_killed_postgres_is_an_error_and_no_silence(&self) -> Result<()> {
        let (before, since) = (self.miniflux()?, self.last_event()?);
        let over = AtomicBool::new(false);
        let (asked, silent) = std::thread::scope(|scope| {
            let asks = scope.spawn(|| self.ask(&over));
            let outcome = self.kill_and_wait(since);
            over.store(true, Ordering::Relaxed);
            let asked = asks
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.map(|()| asked)
        })?;
        ensure!(asked > 0 && silent.is_empty(), "of {asked} requests: {silent:#?}");
        ensure!(self.miniflux()? == before, "Miniflux was restarted");
        self.the_lan_reads("after PostgreSQL was killed")
    }

    fn kill_and_wait(&self, since: u64) -> Result<()> {
        self.inside(
            "sql",
            "kill -9 $(head -1 /var/lib/postgresql/17/main/postmaster.pid)",
        )?;
        until("web heard of it, and that it is over", || {
            let (waits, met) = (self.event(since, "WaitsFor")?, self.event(since, "Met")?);
            Ok((waits.is_some() && met.is_some(), format!("{waits:?} {met:?}")))
        })?;
        self.both_are_ready("after PostgreSQL was killed")
    }

    /// How many requests were made, and those to which nothing came.
    fn ask(&self, over: &AtomicBool) -> (usize, Vec<String>) {
        let (mut asked, mut silent) = (0, Vec::new());
        while !over.load(Ordering::Relaxed) {
            asked += 1;
            if let Err(error) = self.get("/healthcheck", None)
                && is_silence(&error)
            {
                silent.push(format!("{asked}: {error:#}"));
            }
            std::thread::sleep(PACE); // its pace
        }
        (asked, silent)
    }

    /// A database that hangs: the port is closed as long as it does.
    fn a_stopped_postgres_closes_the_port(&self) -> Result<()> {
        let before = self.miniflux()?;
        self.inside("sql", "busybox killall -STOP postgres")?;
        until("the port refuses", || match self.machine.from_peer(PORT, SOON) {
            Ok(_) => Ok((false, "it is open".to_owned())),
            Err(error) if is_refused(&error) => Ok((true, String::new())),
            Err(error) => bail!("it is neither open nor closed: {error:#}"),
        })?;
        let (_, web) = self.guests()?;
        ensure!(web["ready"] != "True", "{web:#}");
        self.inside("sql", "busybox killall -CONT postgres")?;
        self.both_are_ready("after PostgreSQL goes on")?;
        self.the_lan_reads("after PostgreSQL goes on")?;
        ensure!(self.miniflux()? == before, "Miniflux was restarted");
        Ok(())
    }

    /// Neither guest reboots. Miniflux reads its file only at its start, so it starts again.
    fn another_address_changes_nothing_for_the_lan(&self) -> Result<()> {
        let instance = &self.machine.instance;
        let boots = |(sql, web): (Value, Value)| (sql["boot_id"].clone(), web["boot_id"].clone());
        let before = boots(self.guests()?);
        self.configure("192.168.100.77")?;
        let plan = instance.ok(&["plan"])?;
        ensure!(plan.contains("sql: interface: 192.168.100.20/24"), "{plan}");
        instance.ok(&["up", "--timeout", "300"])?;
        until("Miniflux uses the other address", || {
            let url = self.inside("web", &format!("grep -o '@[0-9.:]*' {RUN}/started.conf"))?;
            Ok((url == "@192.168.100.77:5432", url))
        })?;
        self.both_are_ready("at the other address")?;
        self.the_lan_reads("at the other address")?;
        ensure!(boots(self.guests()?) == before, "a guest is another one");
        let clients = "select client_addr from pg_stat_activity where usename = 'web_miniflux' limit 1";
        until("Miniflux is connected there", || {
            let from = instance.ok(&["psql", "sql", "--", "-Atc", clients])?;
            Ok((from.trim() == "192.168.100.30", from))
        })
    }
}

fn io_kind(error: &anyhow::Error) -> Option<std::io::ErrorKind> {
    error.downcast_ref::<std::io::Error>().map(std::io::Error::kind)
}

fn is_refused(error: &anyhow::Error) -> bool {
    io_kind(error) == Some(std::io::ErrorKind::ConnectionRefused)
}

fn is_silence(error: &anyhow::Error) -> bool {
    let kind = io_kind(error);
    kind.is_some_and(|kind| {
        matches!(
            kind,
            std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock
        )
    })
}

fn seq(event: &Value) -> u64 {
    event["seq"].as_u64().unwrap_or(0)
}

fn reason(guest: &Value, subject: &str) -> String {
    let mut conditions = guest["conditions"].as_array().into_iter().flatten();
    let found = conditions.find(|condition| condition["subject"] == subject);
    let reason = found.and_then(|condition| condition["reason"].as_str());
    reason.unwrap_or_default().to_owned()
}

/// What doctor says of a layer of a guest.
fn layer(diagnosis: &Value, guest: &str, subject: &str) -> Result<Value> {
    let guests = diagnosis["guests"].as_array().into_iter().flatten();
    let layers = guests
        .filter(|found| found["name"] == guest)
        .flat_map(|found| found["layers"].as_array().into_iter().flatten());
    let mut layers = layers.filter(|layer| layer["subject"] == subject);
    let found = layers.next().cloned();
    found.with_context(|| format!("no {subject} of {guest}: {diagnosis:#}"))
}
