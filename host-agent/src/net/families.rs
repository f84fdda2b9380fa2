//! Which families of a network are in trouble while the others work. Pure.

use std::collections::BTreeMap;

use rustix::io::Errno;
use sovereign_protocol::subnet::HostAddress;
use sovereign_reconcile::family::Family;

use super::apply::{Failure, StepError};
use super::chain;
use super::plan::{Part, Plan, Step};
use super::wanted::Wanted;

/// Why each family does not have the host's address, if at least one other has it and nothing else is wrong with the
/// links; otherwise nothing.
pub(super) fn lacking(left: &Plan, failures: &[Failure], wanted: &Wanted) -> BTreeMap<Family, String> {
    let addresses = wanted.bridge.iter().flat_map(|bridge| &bridge.addresses);
    let mut asked: Vec<Family> = addresses.map(HostAddress::ip).map(Family::of).collect();
    asked.extend(wanted.taken.keys());
    let left = left.of(Part::Links);
    let mut lacking = BTreeMap::new();
    for conflict in &left.conflicts {
        let Some((family, _)) = wanted.taken.iter().find(|(_, taken)| *taken == conflict) else {
            return BTreeMap::new();
        };
        lacking.insert(*family, format!("{}: {}", conflict.on, conflict.evidence));
    }
    for step in &left.steps {
        let Some(family) = step.family() else {
            return BTreeMap::new();
        };
        let failure = failures.iter().find(|failure| failure.step == *step);
        let why = failure.map_or_else(|| "it was gone again when we looked".to_owned(), cause);
        lacking.entry(family).or_insert_with(|| format!("{step}: {why}"));
    }
    if asked.iter().all(|family| lacking.contains_key(family)) {
        return BTreeMap::new();
    }
    lacking
}

/// What is left beside what these families lack.
pub(super) fn beside(left: &Plan, lacking: &BTreeMap<Family, String>, wanted: &Wanted) -> Plan {
    let lacks = |family: Option<Family>| family.is_some_and(|family| lacking.contains_key(&family));
    let of_lacking = |taken: &Family| lacking.contains_key(taken);
    let taken = wanted.taken.iter().filter(|(family, _)| of_lacking(family));
    let taken: Vec<_> = taken.map(|(_, conflict)| conflict).collect();
    let conflicts = left.conflicts.iter().filter(|conflict| !taken.contains(conflict));
    Plan {
        steps: left
            .steps
            .iter()
            .filter(|step| !lacks(step.family()))
            .cloned()
            .collect(),
        conflicts: conflicts.cloned().collect(),
    }
}

/// Why a step failed, with what the kernel's word means where that is known.
pub(super) fn cause(failure: &Failure) -> String {
    let said = chain(&failure.error);
    match (&failure.step, &failure.error) {
        // net/ipv6/addrconf.c, inet6_addr_add: the only reason for EACCES; for EOPNOTSUPP nobody speaks the family.
        (Step::AddAddress { link, address }, StepError::Kernel(error)) if address.address().is_ipv6() => {
            if error.is(Errno::ACCESS) {
                return format!(
                    "IPv6 is switched off on this host, net.ipv6.conf.{link}.disable_ipv6 is 1: {said}"
                );
            }
            if error.is(Errno::OPNOTSUPP) || error.is(Errno::AFNOSUPPORT) {
                return format!("this kernel has no IPv6: {said}");
            }
            said
        }
        _ => said,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use sovereign_protocol::name::Name;
    use sovereign_reconcile::plan::plan;
    use sovereign_reconcile::simulated::Simulated;
    use sovereign_reconcile::wanted::Switched;

    use super::super::kernel::KernelError;
    use super::super::observed::Kind;
    use super::super::wanted::NetworkSpec;
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn wanted(kernel: &Simulated, addresses: &[&str]) -> Wanted {
        let spec = NetworkSpec {
            addresses: addresses
                .iter()
                .map(|text| HostAddress::parse(text).unwrap())
                .collect(),
            guests: [(name("sql"), BTreeSet::new())].into(),
            ..NetworkSpec::default()
        };
        Wanted::of(&name("default"), &spec, &Switched::new(), &kernel.state).unwrap()
    }

    /// All but what is about a family is done.
    fn made(kernel: &mut Simulated, wanted: &Wanted, families: &[Family]) -> Plan {
        for step in &plan(wanted, &kernel.state).steps {
            if step.family().is_none_or(|family| families.contains(&family)) {
                kernel.apply(step).unwrap();
            }
        }
        plan(wanted, &kernel.state)
    }

    fn refused(step: &Step, errno: Errno) -> Failure {
        let error = std::io::Error::from_raw_os_error(errno.raw_os_error());
        Failure {
            step: step.clone(),
            error: StepError::Kernel(KernelError::Refused(error)),
        }
    }

    const BOTH: [&str; 2] = ["192.168.100.1/24", "fd00:5::1/64"];

    #[test]
    fn one_that_is_switched_off_is_named_with_its_switch_and_the_other_works() {
        let mut kernel = Simulated::new();
        let wanted = wanted(&kernel, &BOTH);
        let left = made(&mut kernel, &wanted, &[Family::V4]);
        let step = left.steps.first().unwrap();
        let lacks = lacking(&left, &[refused(step, Errno::ACCESS)], &wanted);
        assert_eq!(lacks.keys().collect::<Vec<_>>(), [&Family::V6]);
        let text = &lacks[&Family::V6];
        assert!(
            text.starts_with("address fd00:5::1/64: add to sv5pkj: IPv6 is switched off on this host, net.ipv6.conf.sv5pkj.disable_ipv6 is 1: "),
            "{text}"
        );
        assert!(beside(&left, &lacks, &wanted).is_done());
        let lacks = lacking(&left, &[refused(step, Errno::OPNOTSUPP)], &wanted);
        assert!(lacks[&Family::V6].contains("this kernel has no IPv6"));
    }

    #[test]
    fn one_whose_subnet_is_anothers_is_named_and_the_other_works() {
        let mut kernel = Simulated::new();
        let eth0 = kernel.add("eth0", Kind::Other, 0);
        let theirs = HostAddress::parse("192.168.100.77/24").unwrap();
        kernel.add_address(eth0, theirs, false).unwrap();
        let wanted = wanted(&kernel, &BOTH);
        let left = made(&mut kernel, &wanted, &Family::BOTH);
        assert!(!left.is_done());
        let lacks = lacking(&left, &[], &wanted);
        assert!(
            lacks[&Family::V4].starts_with("subnet 192.168.100.0/24: link eth0 has"),
            "{lacks:?}"
        );
        assert_eq!(lacks.len(), 1);
        assert!(beside(&left, &lacks, &wanted).is_done());
    }

    #[test]
    fn nothing_works_when_all_are_in_trouble_or_something_of_the_links_is() {
        let mut kernel = Simulated::new();
        let single = wanted(&kernel, &BOTH[1..]);
        let left = made(&mut kernel, &single, &[]);
        assert!(!left.is_done() && lacking(&left, &[], &single).is_empty());

        let mut kernel = Simulated::new();
        let both = wanted(&kernel, &BOTH);
        let mut left = made(&mut kernel, &both, &[Family::V4]);
        assert!(!lacking(&left, &[], &both).is_empty());
        let name = both.taps.keys().next().unwrap().clone();
        left.steps.insert(Step::SetUp { name });
        assert!(lacking(&left, &[], &both).is_empty());
        assert!(lacking(&Plan::default(), &[], &both).is_empty());
    }
}
