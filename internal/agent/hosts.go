package agent

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/sys"
)

// hostService is what operators may ask about hosts.
type hostService struct {
	lmctlv1.UnimplementedHostsServer
	a *Agent
}

// List implements lmctlv1.HostsServer.
func (s *hostService) List(ctx context.Context, in *lmctlv1.ListHostsRequest) (*lmctlv1.ListHostsResponse, error) {
	names := slices.Sorted(maps.Keys(s.a.cfg.Peers))
	hosts := make([]*lmctlv1.Host, len(names)+1)
	if in.GetBrief() {
		hosts[0] = &lmctlv1.Host{Name: s.a.cfg.Name, Address: s.a.cfg.Advertise, Self: true}
		for i, name := range names {
			hosts[i+1] = &lmctlv1.Host{Name: name, Address: s.a.cfg.Peers[name]}
		}
		return &lmctlv1.ListHostsResponse{Hosts: hosts}, nil
	}
	hosts[0] = s.a.hostFacts(ctx)
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() { hosts[i+1] = s.a.peerFacts(ctx, name) })
	}
	wg.Wait()
	return &lmctlv1.ListHostsResponse{Hosts: hosts}, nil
}

// Show implements lmctlv1.HostsServer.
func (s *hostService) Show(ctx context.Context, in *lmctlv1.HostRequest) (*lmctlv1.Host, error) {
	name := in.GetName()
	if name == "" || name == s.a.cfg.Name {
		return s.a.hostFacts(ctx), nil
	}
	if _, err := s.a.peers.address(name); err != nil {
		return nil, &api.Error{Code: codes.NotFound, Operation: "show host", Object: name, Cause: err.Error()}
	}
	return s.a.peerFacts(ctx, name), nil
}

// Check implements lmctlv1.HostsServer.
func (s *hostService) Check(ctx context.Context, _ *lmctlv1.CheckRequest) (*lmctlv1.CheckResponse, error) {
	return &lmctlv1.CheckResponse{Lines: s.a.check(ctx)}, nil
}

// peerFacts asks a host about itself.
func (a *Agent) peerFacts(ctx context.Context, name string) *lmctlv1.Host {
	host := &lmctlv1.Host{Name: name, Address: a.cfg.Peers[name]}
	c, err := a.peers.client(name)
	if err != nil {
		host.Problem = err.Error()
		return host
	}
	ctx, cancel := context.WithTimeout(ctx, a.cfg.PeerTimeout)
	defer cancel()
	began := time.Now()
	facts, err := c.Peer.HostFacts(ctx, &lmctlv1.HostFactsRequest{})
	if err != nil {
		host.Problem = err.Error()
		return host
	}
	facts.RoundTrip = durationpb.New(time.Since(began))
	facts.Name, facts.Address, facts.Self, facts.Reachable = name, host.Address, false, true
	return facts
}

// hostFacts describes this host.
func (a *Agent) hostFacts(ctx context.Context) *lmctlv1.Host {
	h := &lmctlv1.Host{
		Name: a.cfg.Name, Address: a.cfg.Advertise, Self: true, Reachable: true, AgentVersion: a.version,
		Hypervisor: a.cfg.Hypervisor, Cpus: int32(runtime.NumCPU()), Time: timestamppb.Now(),
	}
	if h.Address == "" {
		h.Address = a.cfg.Listen
	}
	var problems []string
	problem := func(err error) {
		if err != nil {
			problems = append(problems, err.Error())
		}
	}
	var uts unix.Utsname
	problem(unix.Uname(&uts))
	h.Kernel = unix.ByteSliceToString(uts.Release[:])
	var err error
	h.HypervisorVersion, err = qemuVersion(ctx)
	problem(err)
	h.MemoryBytes, h.MemoryAvailableBytes, err = sys.Memory()
	problem(err)
	h.Kvm = openKVM() == nil
	if a.identity != nil {
		h.CertificateExpires = timestamppb.New(a.identity.Expires())
	}
	for _, info := range a.driver.List() {
		h.Guests++
		if info.State == hypervisor.StateRunning {
			h.GuestsRunning++
		}
	}
	h.Problem = strings.Join(problems, "; ")
	return h
}

// qemuBinary is the hypervisor unless a guest names another.
const qemuBinary = "qemu-system-x86_64"

// qemuAsked is the last answer of qemuVersion, for as long as the binary is the
// same.
var qemuAsked struct {
	sync.Mutex
	path    string
	modTime time.Time
	version string
}

// qemuVersion is the hypervisor's version, like 7.2.22.
func qemuVersion(ctx context.Context) (string, error) {
	path, err := exec.LookPath(qemuBinary)
	if err != nil {
		return "", err
	}
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	qemuAsked.Lock()
	defer qemuAsked.Unlock()
	if qemuAsked.path == path && qemuAsked.modTime.Equal(st.ModTime()) {
		return qemuAsked.version, nil
	}
	version, err := askQEMU(ctx)
	if err == nil {
		qemuAsked.path, qemuAsked.modTime, qemuAsked.version = path, st.ModTime(), version
	}
	return version, err
}

func askQEMU(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, qemuBinary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", qemuBinary, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	_, rest, ok := strings.Cut(line, "version ")
	if !ok {
		return "", fmt.Errorf("%s --version says %q", qemuBinary, line)
	}
	version, _, _ := strings.Cut(rest, " ")
	return version, nil
}

// openKVM says why /dev/kvm cannot be used.
func openKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}
