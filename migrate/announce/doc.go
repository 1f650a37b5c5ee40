// Package announce keeps the network with a guest that moves between hosts.
//
// A guest keeps its MAC and its IP addresses when it moves, but the switches
// between the hosts still send its frames to the old port until a frame with
// its MAC comes from the new one. The pieces, in the order of a migration:
//
//   - Start watches a guest's tap on the host where it runs and learns the
//     addresses that nobody wrote into the guest's definition.
//   - OpenStranded, at the source, before the guest is stopped, begins to keep
//     what comes for it.
//   - Redirect, at the destination, as soon as the tap is up, tells the local
//     bridge that the guest is now behind the tap.
//   - Begin, at the destination, right after the vCPUs run, puts out the first
//     announcement before it returns; Announcement.Repeat sends the others.
//     Announce does both.
//   - Stranded.Unread and Forward, at the source, once the first announcement
//     is out, send on the frames that arrived for the stopped guest. TapFDs finds
//     the tap's descriptors in the hypervisor's process.
//
// Everything happens in the network namespace of the calling thread; a caller
// that has entered another one holds its thread (runtime.LockOSThread) during
// the call. All sockets are opened by the call itself, so that what happens
// later, in Repeat, Forward or a Learner, does not depend on the thread.
//
// Only Linux bridges are served. On a bridge that filters VLANs the frames go
// out with the tag that the tap's untagged frames (its PVID) have on each port.
package announce
