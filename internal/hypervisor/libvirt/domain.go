package libvirt

import (
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/internal/hypervisor/queue"
)

// domain is a libvirt domain as the driver knows it.
type domain struct {
	d     *Driver
	name  string
	uuid  string
	files files

	// telling keeps the watchers' snapshots in the order of the changes.
	telling sync.Mutex
	// looking keeps looks at libvirt from overtaking one another.
	looking sync.Mutex

	mu        sync.Mutex
	facts     facts
	obstacles []string // to a direct migration of one that runs, known without asking
	state     hypervisor.State
	runstate  string
	proc      *process // nil without one
	started   time.Time
	end       *hypervisor.End
	intent    hypervisor.EndCause // what we are about to do to it
	busy      string
	gone      bool
	lost      bool // libvirtd cannot be asked
	awaited   bool // another look at it is about to come
	// suspended and incoming are what our own migrations make of it; they are on
	// disk too.
	suspended bool
	incoming  bool
	shell     *Shell // our own, while it is one
	listener  *queue.Queue[happening]
	learners  *nics.Learners
	brought   map[string]nics.Facts // what the host it came from knew of its cards
	// arriving is of one that was told to run here, and perhaps did, but is not
	// defined here yet (see arrival.go); else nil.
	arriving *shellRecord
	owed     string        // why it could not be defined when that was tried last
	again    time.Duration // before the next look, while it has no process or is owed
}

// files are a domain's on this host.
type files struct{ dir string }

func (f files) suspension() string { return filepath.Join(f.dir, "suspension.json") }
func (f files) shell() string      { return filepath.Join(f.dir, "shell.json") }
func (f files) resumed() string    { return filepath.Join(f.dir, "resumed") }
func (f files) stream() string     { return filepath.Join(f.dir, "stream") }

// travels is the folder with the files of all domains, by UUID.
func (d *Driver) travels() string { return filepath.Join(d.cfg.RunDir, "libvirt") }

func (d *Driver) filesOf(id string) files { return files{filepath.Join(d.travels(), id)} }

// newDomain is one of which nothing is known before the first look but what our
// own migrations have left of it on disk.
func (d *Driver) newDomain(name, id string) *domain {
	files := d.filesOf(id)
	return &domain{
		d: d, name: name, uuid: id, files: files, state: hypervisor.StateUnreachable,
		suspended: there(files.suspension()), incoming: there(files.shell()),
	}
}

// ref is how libvirt's calls name the domain.
func (g *domain) ref() lv.Domain {
	return lv.Domain{Name: g.name, UUID: lv.UUID(uuid.MustParse(g.uuid)), ID: -1}
}

// begin takes the domain for one operation. The caller calls done.
func (g *domain) begin(operation string, allowed ...hypervisor.State) (done func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.busy != "" {
		return nil, &hypervisor.BusyError{Guest: g.name, Operation: g.busy}
	}
	state := g.stateNow()
	ok := len(allowed) == 0
	for _, s := range allowed {
		ok = ok || state == s
	}
	if !ok {
		return nil, &hypervisor.StateError{Guest: g.name, Operation: operation, State: state}
	}
	g.busy = operation
	var once sync.Once
	return func() {
		once.Do(func() {
			g.mu.Lock()
			g.busy = ""
			g.mu.Unlock()
		})
	}, nil
}

// stateNow is the state with all that overlays libvirt's. The mu is held.
func (g *domain) stateNow() hypervisor.State {
	switch {
	case g.gone:
		return hypervisor.StateRemoved
	case g.lost && g.state != hypervisor.StateStopped:
		return hypervisor.StateUnreachable
	case g.state == hypervisor.StateUnreachable && g.shell == nil:
		return g.state // what its files say is not known to be true
	case g.incoming:
		return hypervisor.StateIncoming
	case g.suspended && g.state != hypervisor.StateStopped:
		return hypervisor.StateMigrating
	}
	return g.state
}

func (g *domain) info() hypervisor.Info {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := hypervisor.Info{
		Name: g.name, UUID: g.uuid, State: g.stateNow(), Busy: g.busy, Runstate: g.runstate,
		Memory: g.facts.memory, VCPUs: g.facts.vcpus, Bridges: g.facts.bridges,
		Machine: g.facts.machine, Accelerator: g.facts.accelerator, CPU: g.facts.cpu,
		Started: g.started, Suspended: g.suspended, Arriving: g.arriving != nil, LogPath: filepath.Join("/var/log/libvirt/qemu", g.name+".log"),
		ConsolePath: g.facts.console,
	}
	if g.proc != nil {
		i.PID = g.proc.pid
		i.Mode, i.ModeReason = "direct", "its memory is in shared files"
		if len(g.obstacles) > 0 {
			i.Mode, i.ModeReason = relayMode(g.facts.xml, strings.Join(g.obstacles, "; "))
		}
	}
	if g.end != nil {
		end := *g.end
		i.End = &end
	}
	return i
}

// tell alters the domain under its lock and tells the watchers.
func (g *domain) tell(alter func()) {
	g.telling.Lock()
	defer g.telling.Unlock()
	g.mu.Lock()
	alter()
	g.mu.Unlock()
	g.d.watchers.Tell(g.info())
}

// intend notes what we are about to do to the domain.
func (g *domain) intend(cause hypervisor.EndCause) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.intent = cause
}

// letGo gives up what the driver holds of a running domain.
func (g *domain) letGo() error {
	g.mu.Lock()
	proc, learners := g.proc, g.learners
	g.proc, g.learners = nil, nil
	g.mu.Unlock()
	return errors.Join(learners.Close(), proc.close())
}
