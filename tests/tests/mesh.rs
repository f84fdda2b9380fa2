//! Floor 3: two real guests, of which one needs the other: Miniflux and its PostgreSQL on a bridge of their own.

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sovereign_tests::Instance;
use sovereign_tests::client::http;
use sovereign_tests::net::can_run;

/// What takes a probe or two, emulated.
const SOON: Duration = Duration::from_secs(60);
/// Where Miniflux keeps what it was started with.
const RUN: &str = "/run/sovereign/miniflux";

struct Mesh<'i> {
    instance: &'i Instance,
    /// The port of this machine that leads to Miniflux.
    port: u16,
}

#[test]
fn a_guest_needs_a_service_of_another() -> Result<()> {
    if !can_run("a_guest_needs_a_service_of_another") {
        return Ok(());
    }
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    Instance::new()?.go_through(|instance| Mesh { instance, port }.live())
}

impl Mesh<'_> {
    fn live(&self) -> Result<()> {
        self.configure("192.168.100.20")?;
        // One guest by name brings up the other.
        self.instance.ok(&["up", "web", "--timeout", "300"])?;
        let (sql, web) = (self.guest("sql")?, self.guest("web")?);
        ensure!(
            sql["ready"] == "True" && web["ready"] == "True",
            "{sql:#}\n{web:#}"
        );
        ensure!(self.get("/healthcheck", None)?.ends_with("\r\n\r\nOK"));
        self.the_edge_is_shown(&web)?;
        self.its_first_account_can_log_in()?;
        self.nobody_else_sees_the_credential()?;
        self.a_killed_postgres_is_waited_for()?;
        self.agents_come_and_go()?;
        self.a_stopped_postgres_is_the_one_finding()?;
        self.another_address_reaches_both(&sql, &web)?;
        self.who_needs_it_comes_and_goes_without_a_restart()?;
        self.who_needs_another_stops_first()
    }

    fn configure(&self, sql: &str) -> Result<()> {
        self.instance.write(&format!(
            "[network]\nnamespace = \"private\"\n\n\
             [guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\naddress = \"{sql}\"\n\
             [guest.sql.service.postgres]\nkind = \"postgres\"\n\n\
             [guest.web]\nmemory = \"256MiB\"\ndata = \"64MiB\"\naddress = \"192.168.100.30\"\n\
             [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n\
             [[guest.web.forward]]\nname = \"miniflux\"\nlisten = \"127.0.0.1:{}\"\n",
            self.port
        ))
    }

    fn guest(&self, name: &str) -> Result<Value> {
        self.instance.guest_named(name)
    }

    fn inside(&self, guest: &str, line: &str) -> Result<String> {
        let said = self.instance.ok(&["exec", guest, "--", "sh", "-c", line])?;
        Ok(said.trim().to_owned())
    }

    fn miniflux_pid(&self) -> Result<String> {
        self.inside("web", &format!("cat {RUN}/pid && kill -0 $(cat {RUN}/pid)"))
    }

    fn until(&self, what: &str, wanted: impl Fn(&Value, &Value) -> bool) -> Result<(Value, Value)> {
        let begun = Instant::now();
        loop {
            let (sql, web) = (self.guest("sql")?, self.guest("web")?);
            if wanted(&sql, &web) {
                return Ok((sql, web));
            }
            if begun.elapsed() > SOON {
                bail!("{what}: not within {SOON:?}; last: {sql:#}\n{web:#}");
            }
            std::thread::sleep(Duration::from_millis(50)); // polls a process, waits for nothing else
        }
    }

    fn until_sql(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        self.until(what, |sql, _| wanted(sql)).map(drop)
    }

    /// What Miniflux answers through the forward.
    fn get(&self, path: &str, basic: Option<&str>) -> Result<String> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(SOON))?;
        http::get(stream, path, basic)
    }

    fn the_edge_is_shown(&self, web: &Value) -> Result<()> {
        let edge = condition(web, "miniflux.requires")?;
        ensure!(edge["reason"] == "Met" && edge["layer"] == "service", "{edge:#}");
        ensure!(
            web["requires"][0]["of"] == "sql/postgres" && web["requires"][0]["status"] == "True",
            "{web:#}"
        );
        let granted = condition(&self.guest("sql")?, "postgres.web_miniflux")?;
        ensure!(granted["reason"] == "Granted", "{granted:#}");
        // It waited until then.
        let waited = self.event(0, ("web", "miniflux.requires"), "WaitsFor")?;
        ensure!(
            waited["evidence"]
                .as_str()
                .is_some_and(|text| text.starts_with("sql/postgres "))
        );
        Ok(())
    }

    /// The first event of this guest, subject and reason after a number.
    fn event(&self, after: u64, (guest, subject): (&str, &str), reason: &str) -> Result<Value> {
        let events = self.instance.events()?;
        let found = events.into_iter().find(|event| {
            event["guest"] == guest
                && event["subject"] == subject
                && event["reason"] == reason
                && seq(event) > after
        });
        found.with_context(|| format!("no event {guest} {subject} {reason} after {after}"))
    }

    fn last_event(&self) -> Result<u64> {
        Ok(self.instance.events()?.last().map_or(0, seq))
    }

    fn its_first_account_can_log_in(&self) -> Result<()> {
        let password = self.instance.ok(&["secret", "web/miniflux"])?;
        let me = self.get("/v1/me", Some(&format!("admin:{}", password.trim())))?;
        ensure!(me.contains("\"username\":\"admin\""), "{me}");
        Ok(())
    }

    fn nobody_else_sees_the_credential(&self) -> Result<()> {
        let credential = self.instance.ok(&["secret", "sql/postgres/web_miniflux"])?;
        let credential = credential.trim();
        let conf = self.inside(
            "web",
            &format!("stat -c %a:%U {RUN}/miniflux.conf; cat {RUN}/miniflux.conf"),
        )?;
        ensure!(
            conf.starts_with("600:miniflux\n") && conf.contains(credential),
            "the right one is looked for: {conf}"
        );
        let seen = self.inside(
            "web",
            &format!("cat /proc/$(cat {RUN}/pid)/environ /proc/*/cmdline"),
        )?;
        ensure!(
            seen.contains("miniflux.conf") && !seen.contains(credential),
            "{seen}"
        );
        let store = std::fs::read(self.instance.state().join("state.redb"))?;
        let holds = |text: &str| store.windows(text.len()).any(|window| window == text.as_bytes());
        ensure!(holds("miniflux") && !holds(credential));
        Ok(())
    }

    /// Miniflux is told, is not restarted, and goes on.
    fn a_killed_postgres_is_waited_for(&self) -> Result<()> {
        let (before, since) = (self.miniflux_pid()?, self.last_event()?);
        self.inside(
            "sql",
            "kill -9 $(head -1 /var/lib/postgresql/17/main/postmaster.pid)",
        )?;
        self.until("web hears of it", |_, web| {
            let waits = condition(web, "miniflux.requires").is_ok_and(|edge| {
                let evidence = edge["evidence"].as_str().unwrap_or_default();
                edge["reason"] == "WaitsFor" && evidence.starts_with("sql/postgres is False: ")
            });
            web["ready"] == "False" && waits
        })?;
        self.until("both are ready again", |sql, web| {
            sql["ready"] == "True" && web["ready"] == "True"
        })?;
        ensure!(self.miniflux_pid()? == before, "it was not restarted");
        self.event(since, ("web", "miniflux.requires"), "WaitsFor")?;
        self.event(since, ("web", "miniflux.requires"), "Met")?;
        self.its_first_account_can_log_in()
    }

    /// Neither agent's death is the service's.
    fn agents_come_and_go(&self) -> Result<()> {
        let (before, since) = (self.miniflux_pid()?, self.last_event()?);
        self.instance.ok(&["host", "stop"])?;
        self.instance.ok(&["up"])?;
        // The command dies with the agent that carries it out.
        self.instance
            .run(&["exec", "web", "--", "busybox", "killall", "-9", "sovereign-guest"])?;
        self.until("another agent adopts it", |_, web| {
            let again = self.event(since, ("web", "miniflux"), "Starting").is_ok();
            again && web["ready"] == "True"
        })?;
        ensure!(self.miniflux_pid()? == before, "it was not restarted");
        Ok(())
    }

    /// Doctor names the cause in the one guest, and says of the other what it is blocked by.
    fn a_stopped_postgres_is_the_one_finding(&self) -> Result<()> {
        self.inside("sql", "busybox killall -STOP postgres")?;
        let silent = |found: &[String]| found == ["service Silent"];
        let diagnosis = self.instance.until_found(SOON, silent)?;
        ensure!(diagnosis["findings"][0]["guest"] == "sql", "{diagnosis:#}");
        let blocked = |diagnosis: &Value| {
            let guests = diagnosis["guests"].as_array().into_iter().flatten();
            let web = guests.clone().find(|guest| guest["name"] == "web");
            let layers = web
                .and_then(|web| web["layers"].as_array())
                .cloned()
                .unwrap_or_default();
            layers.iter().any(|layer| {
                layer["subject"] == "miniflux.requires"
                    && layer["verdict"] == "blocked"
                    && layer["blocked_by"][0]["guest"] == "sql"
                    && layer["blocked_by"][0]["subject"] == "postgres"
            })
        };
        ensure!(blocked(&diagnosis), "{diagnosis:#}");
        self.inside("sql", "busybox killall -CONT postgres")?;
        self.instance.until_found(SOON, <[String]>::is_empty)?;
        Ok(())
    }

    /// No reboot on either side; Miniflux reads its file only at its start, so it starts again.
    fn another_address_reaches_both(&self, sql: &Value, web: &Value) -> Result<()> {
        self.configure("192.168.100.77")?;
        let plan = self.instance.ok(&["plan"])?;
        ensure!(plan.contains("sql: interface: 192.168.100.20/24"), "{plan}");
        self.instance.ok(&["up"])?;
        let (now_sql, now_web) = (self.guest("sql")?, self.guest("web")?);
        ensure!(now_sql["boot_id"] == sql["boot_id"] && now_web["boot_id"] == web["boot_id"]);
        let edge = condition(&now_web, "miniflux.requires")?;
        ensure!(
            edge["evidence"]
                .as_str()
                .is_some_and(|text| text.contains("at 192.168.100.77 port 5432")),
            "{edge:#}"
        );
        self.until("Miniflux is ready at the other address", |_, web| {
            let url = self.inside("web", &format!("grep -o '@[0-9.:]*' {RUN}/started.conf"));
            web["ready"] == "True" && url.is_ok_and(|url| url == "@192.168.100.77:5432")
        })?;
        let connected = "select client_addr from pg_stat_activity where usename = 'web_miniflux' limit 1";
        self.until("Miniflux is connected there", |_, _| {
            let from = self.instance.ok(&["psql", "sql", "--", "-Atc", connected]);
            from.is_ok_and(|from| from.trim() == "192.168.100.30")
        })?;
        self.its_first_account_can_log_in()
    }

    /// PostgreSQL is not started again because its client is away for a while.
    fn who_needs_it_comes_and_goes_without_a_restart(&self) -> Result<()> {
        let postgres = || self.inside("sql", "head -1 /var/lib/postgresql/17/main/postmaster.pid");
        let rules = "select count(*) from pg_hba_file_rules where database = '{web_miniflux}'";
        let count = || self.instance.ok(&["psql", "sql", "--", "-Atc", rules]);
        let (before, one) = (postgres()?, count()?);
        ensure!(one.trim() == "1", "{one}");
        self.instance.ok(&["down", "web"])?;
        self.until_sql("its role is forgotten", |sql| {
            condition(sql, "postgres.web_miniflux").is_err()
        })?;
        // The document is taken over first, the file is written then.
        let begun = std::time::Instant::now();
        while count()?.trim() != "0" {
            ensure!(begun.elapsed() < SOON, "it is let in still");
        }
        self.instance.ok(&["up", "web"])?;
        ensure!(postgres()? == before && count()? == one);
        self.its_first_account_can_log_in()
    }

    /// Also when only the other one is named.
    fn who_needs_another_stops_first(&self) -> Result<()> {
        let since = self.last_event()?;
        self.instance.ok(&["down", "sql"])?;
        let web = self.event(since, ("web", "vmm"), "PoweredOff")?;
        let sql = self.event(since, ("sql", "agent"), "Lost")?;
        ensure!(seq(&web) < seq(&sql), "{web:#}\n{sql:#}");
        self.event(seq(&sql), ("sql", "vmm"), "PoweredOff")?;
        self.instance.ok(&["down"])?;
        ensure!(
            self.instance.processes().is_empty(),
            "{:?}",
            self.instance.processes()
        );
        Ok(())
    }
}

fn seq(event: &Value) -> u64 {
    event["seq"].as_u64().unwrap_or(0)
}

fn condition(guest: &Value, subject: &str) -> Result<Value> {
    let conditions = guest["conditions"].as_array().context("no conditions")?;
    let found = conditions
        .iter()
        .find(|condition| condition["subject"] == subject);
    Ok(found
        .with_context(|| format!("no {subject} in {guest:#}"))?
        .clone())
}
