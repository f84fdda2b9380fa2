//! `down --dry-run`: what `down` would change; changes nothing itself.

use std::collections::BTreeSet;

use sovereign_protocol::name::Name;
use sovereign_protocol::spec::HostSpec;
use sovereign_protocol::status::Phase;
use sovereign_reconcile::plan::{Plan, plan};
use sovereign_reconcile::view::{NetworkMode, NetworkView};
use sovereign_reconcile::wanted::{NetworkSpec, Place, Switched, Wanted};

use crate::agent::Binaries;
use crate::context::Context;
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::plan::{Going, Step, down, network_spec};
use crate::{look, shims, unit};

/// Prints the plan of `down`, or of `down NAME`.
///
/// # Errors
/// `Configuration` when there is no such guest; those of asking the host agent and of looking at the network.
pub(super) async fn show(context: &Context, only: Option<&Name>) -> Result<(), CommandError> {
    let layout = &context.layout;
    let steps = match Link::connect_if_running(layout).await? {
        Some(link) => running(context, &link, only).await?,
        None => {
            let mut guests = shims::running(layout);
            guests.retain(|guest| only.is_none_or(|only| only == guest));
            let going = Going {
                agent: !guests.is_empty() && only.is_none(),
                ..Going::default()
            };
            let first = (!guests.is_empty()).then_some(Step::StartAgent);
            first.into_iter().chain(down(None, &guests, going)).collect()
        }
    };
    super::plan::told(context, &steps, "sovereign down")
}

async fn running(context: &Context, link: &Link, only: Option<&Name>) -> Result<Vec<Step>, CommandError> {
    let spec = link.wanted().await?;
    let report = link.status().await?;
    let lives = report.guests.iter().filter(|guest| guest.phase != Phase::Stopped);
    let lives: BTreeSet<Name> = lives.map(|guest| guest.name.clone()).collect();
    let view = link.network().await?.unwrap_or_else(|| NetworkView {
        mode: NetworkMode::Undecided,
        observed: Default::default(),
        cards: BTreeSet::new(),
    });
    let Some(only) = only else {
        return all(context, spec.as_ref(), &lives, &view).await;
    };
    if !report.guests.iter().any(|guest| guest.name == *only) {
        let message = format!("there is no guest {only}");
        return Err(CommandError::new(Kind::Configuration, "NoSuchGuest", message).next("sovereign status"));
    }
    let mut rest = spec.clone();
    let mut guests = BTreeSet::from([only.clone()]);
    if let Some(rest) = &mut rest {
        guests.extend(super::down::needing(rest, only));
        rest.guests.retain(|name, _| !guests.contains(name));
    }
    guests.retain(|guest| lives.contains(guest));
    let going = Going {
        network: match (&rest, view.mode.is_there()) {
            (Some(rest), true) => left(context, rest, &view)?,
            _ => Plan::default(),
        },
        ..Going::default()
    };
    Ok(down(spec.as_ref(), &guests, going))
}

/// What is to be done for the cards of guests that stay.
fn left(context: &Context, rest: &HostSpec, view: &NetworkView) -> Result<Plan, CommandError> {
    let spec = network_spec(rest, |name| view.cards.contains(name));
    let wanted = Wanted::of(&context.layout.instance, &spec, &Switched::new(), &view.observed);
    let wanted = wanted.map_err(|error| {
        CommandError::new(Kind::Internal, "BadNetwork", "no network can be made of it").because(error)
    })?;
    Ok(plan(&wanted, &view.observed))
}

async fn all(
    context: &Context,
    spec: Option<&HostSpec>,
    lives: &BTreeSet<Name>,
    view: &NetworkView,
) -> Result<Vec<Step>, CommandError> {
    let stays = unit::is_installed(&context.environment, &context.layout);
    let mut going = Going {
        agent: !stays,
        namespace: !stays && view.mode == NetworkMode::Private,
        network: Plan::default(),
    };
    if view.mode == NetworkMode::Host {
        // An installed agent keeps its bridge, and nobody is on it.
        let nobody = stays.then(|| NetworkSpec {
            place: Place::Host,
            ..NetworkSpec::default()
        });
        let seen = look::look(context, &Binaries::find()?, nobody.as_ref()).await?;
        let plan = seen.plan(&context.layout.instance, nobody.as_ref());
        going.network = plan.map_err(|error| {
            CommandError::new(Kind::Internal, "BadNetwork", "no network can be made of it").because(error)
        })?;
    }
    Ok(down(spec, lives, going))
}
