package lab

import (
	"strings"
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/testenv"
)

// upLibvirt makes a lab whose hosts have libvirt, with agents that only stand
// in.
func upLibvirt(t *testing.T, o Options) *Lab {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedQEMU(t)
	testenv.NeedTool(t, "virsh")
	if _, err := findDaemon("libvirtd", ""); err != nil {
		testenv.Missing(t, "libvirtd", err)
	}
	o.Hypervisor = Libvirt
	l := up(t, o)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, host := range l.Hosts() {
			for _, d := range l.Daemons() {
				t.Logf("%s of %s: %s", d, host, l.lastWords(host, d))
			}
		}
	})
	return l
}

func virsh(t *testing.T, l *Lab, host string, args ...string) string {
	t.Helper()
	out, err := l.Output(t.Context(), host, append([]string{"virsh"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func TestLibvirtHosts(t *testing.T) {
	start := time.Now()
	l := upLibvirt(t, Options{MemoryLimit: 1 << 30})
	t.Log("up", time.Since(start))
	for _, host := range l.Hosts() {
		if got := virsh(t, l, host, "hostname"); got != host {
			t.Errorf("libvirt of %s says that it is on %q", host, got)
		}
		t.Log(virsh(t, l, host, "list", "--all"))
		t.Log(virsh(t, l, host, "net-list", "--all"))
		t.Log(virsh(t, l, host, "version"))
	}
	b, err := l.Output(t.Context(), "host1", "sh", "-c", "cat /proc/self/mounts; ls -laR /run; ls /sys/class/net; ls -la /etc/libvirt /var/lib/libvirt /var/lib/libvirt/images; env")
	t.Logf("%s %v", b, err)
}
