// Package dirtymap finds out which pages of another process' memory were
// written, without that process' help: the heart of pre-copy migration of an
// unmodified hypervisor.
//
// [Probe] says whether this kernel can. [Attach] starts to track some ranges of
// a process. From then on every [Tracker.Collect] adds the pages written since
// the one before to a [Bitmap] for each range, and starts anew; [Tracker.Peek]
// only looks, for the last scan while the guest is stopped. [Tracker.Close]
// leaves the process as it was found.
//
// # How it works
//
// Linux 6.7 and later keep book in the page tables: a range that is registered
// with a userfaultfd in asynchronous write-protect mode loses the protection of
// a page with the first write to it, without a message to anybody, and the
// PAGEMAP_SCAN ioctl reports and renews it in one atomic step. Whatever writes
// through the page tables of the process is seen: its threads, KVM, vhost. What
// pinned pages before the scan and writes them by DMA afterwards is not: drain
// such I/O after the scan and before copying.
//
// The userfaultfd must belong to the tracked process. Its main thread is made
// to create it, through ptrace, then the agent takes a copy and has the process
// close its own. The thread is stopped for some 100 µs; the others, vCPUs among
// them, are not. The registration ends with the agent's copy, that is, with
// Close or with the agent's death, whichever comes first.
//
// The injected call repairs itself: before the one ptrace request that diverts
// the thread, a signal frame that holds its whole state is on its stack, and
// the diverted thread returns through sigreturn. The agent may be killed between
// any two instructions, and the process goes on as if nothing had happened.
//
// # What costs nothing
//
// Where the file behind a region has no data there is nothing to track: a block
// of 2 MiB gets a page table, with a marker for every page that is not there,
// only when it holds data. Time and memory follow what the guest has used, not
// what it was given. It takes that the file is written through the tracked
// process alone, and that nobody reads its holes through a mapping, which fills
// them with pages that are then reported once.
//
// Kernels differ in whether they report a range without a page table as written,
// and before 2026 a protecting scan of such a range in hugetlbfs could hang.
// Neither matters here: only ranges with page tables are scanned. Where one has
// gone again all of its pages count as written.
//
// # Parents that trace
//
// A process that waits with wait4, waitid or os.Process.Wait for a child that it
// traces at the same time is woken by the child's ptrace stops, and takes them
// for the child's end. A program that starts hypervisors and tracks them must
// therefore wait for the pidfd first (sys.WaitPidfd), and reap afterwards.
package dirtymap
