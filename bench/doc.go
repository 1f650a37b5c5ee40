// Package bench measures live migrations, ours and others', in the same way:
// from outside the guest.
//
// A Contender is a way to move a guest, a Workload is a guest with something to
// do, a Link is what connects the hosts. All three are values: Contenders,
// Workloads and Links list them, and a new one is a new entry. Run takes some of
// each, makes a lab of two hosts, and moves every guest back and forth, the
// contenders in turn, so that what else goes on in the machine meets all alike.
//
// Measured are, for each migration and whoever does it:
//
//   - downtime: the longest time in which the guest's own clock did not go on,
//     seen in the memory files of both hosts. Two figures stand beside it: the
//     longest such gap just before, when nothing was going on, and how late the
//     probe itself came to look;
//   - switchover: the longest such time after which the guest went on at the other
//     host. On a quiet machine it is the downtime; where others want the CPUs too
//     the guest may be kept waiting for longer at another moment;
//   - own: the downtime by the contender's own account, from the guest being
//     stopped until it was running;
//   - total: from the command until the guest's process at the source has ended,
//     the start of the process at the destination included;
//   - bytes: what the source's network interface has sent meanwhile;
//   - health: the guest's own verdict on its memory afterwards. A guest that is
//     not healthy is replaced by a fresh one, and counted.
package bench
