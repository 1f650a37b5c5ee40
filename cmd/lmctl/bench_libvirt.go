package main

import (
	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/lab"
)

const benchLibvirtLong = benchLong + `

Here the guests are domains of two real libvirtd's, and lmctl migrate (direct)
and virsh migrate --live move the same domain in turn: where one has taken it,
the other brings it back, and who begins changes from run to run, so that each
goes either way as often, and comes as often after itself as after the other.
Both are commands on the source host. The downtime is the longest time in which
the guest's counter stood still, in the memory files of both hosts; switchover is
the longest after which it went on at the other host; own is what lmctl's report
and libvirt's statistics of the job say.

virsh gets libvirt's defaults and no --timeout, which would end a migration that
does not converge by suspending the guest. One that takes more than a minute,
whoever's it is, is called off, has failed and is counted as that; the guest is
then replaced by a fresh one. Medians are of those that came to their end.`

func newBenchLibvirtCommand(o *options) *cobra.Command {
	f := benchFlags{
		hypervisor: lab.Libvirt, runs: 10, each: true,
		workloads: []string{"idle-256M", "writer"}, contenders: []string{"lmctl", "virsh"},
	}
	cmd := &cobra.Command{
		Use: "libvirt", Short: "lmctl migrate and virsh migrate --live, with the same domains", Long: benchLibvirtLong,
		Example: "  lmctl bench libvirt\n  lmctl bench libvirt --runs 20 --workloads writer --json --out libvirt.json",
		Args:    takes(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return o.bench(cmd.Context(), &f) },
	}
	f.register(cmd)
	f.registerSmallest(cmd)
	return cmd
}
