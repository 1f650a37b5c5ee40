package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
)

// vm is a guest as the driver knows it.
type vm struct {
	d     *Driver
	def   *Definition // never changes
	files files
	// telling keeps the watchers' snapshots in the order of the changes.
	telling sync.Mutex
	// recording keeps the writes of the record in the order of its changes.
	recording sync.Mutex

	mu       sync.Mutex
	rec      record
	state    hypervisor.State
	busy     string // the operation under way
	runstate string
	inst     *instance      // nil without a process
	learners *nics.Learners // while the guest runs
}

func (d *Driver) newVM(def *Definition) *vm {
	return &vm{d: d, def: def, files: d.filesOf(def.Name, def.UUID), state: hypervisor.StateStopped}
}

// begin takes the guest for one operation. The caller calls done.
func (v *vm) begin(operation string, allowed ...hypervisor.State) (done func(), err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.busy != "" {
		return nil, &hypervisor.BusyError{Guest: v.def.Name, Operation: v.busy}
	}
	ok := len(allowed) == 0
	for _, s := range allowed {
		ok = ok || v.state == s
	}
	if !ok {
		return nil, &hypervisor.StateError{Guest: v.def.Name, Operation: operation, State: v.state}
	}
	v.busy = operation
	var once sync.Once
	return func() {
		once.Do(func() {
			v.mu.Lock()
			v.busy = ""
			v.mu.Unlock()
		})
	}, nil
}

func (v *vm) info() hypervisor.Info {
	v.mu.Lock()
	defer v.mu.Unlock()
	i := hypervisor.Info{
		Name: v.def.Name, UUID: v.def.UUID, State: v.state, Busy: v.busy, Runstate: v.runstate,
		Memory: int64(v.def.Memory), VCPUs: v.def.VCPUs, Bridges: v.def.bridges(),
		Mode: "direct", ModeReason: "its memory is one shared file", LogPath: v.files.log(), ConsolePath: v.files.console(),
		ConsoleLog: v.files.consoleLog(), Observer: v.files.observer(), Arriving: v.rec.Incoming,
	}
	if v.inst != nil {
		i.PID = v.inst.proc.id.PID
		i.Suspended = v.inst.suspended
	}
	if run := v.rec.Run; run != nil {
		i.Machine, i.Accelerator, i.CPU, i.Version, i.Started = run.Machine, string(run.Accelerator), run.CPU, run.Version, run.Started
	}
	if v.rec.End != nil {
		end := *v.rec.End
		i.End = &end
	}
	return i
}

// setState notes a state and tells the watchers.
func (v *vm) setState(s hypervisor.State) {
	v.change(func() { v.state = s })
}

// change alters the guest under its lock and tells the watchers.
func (v *vm) change(alter func()) {
	v.telling.Lock()
	defer v.telling.Unlock()
	v.mu.Lock()
	alter()
	v.mu.Unlock()
	v.d.tell(v.info())
}

// updateRecord alters the record and writes it durably.
func (v *vm) updateRecord(alter func(*record)) error {
	v.recording.Lock()
	defer v.recording.Unlock()
	v.mu.Lock()
	alter(&v.rec)
	content, err := json.MarshalIndent(v.rec, "", "  ")
	v.mu.Unlock()
	if err != nil {
		return fmt.Errorf("record of guest %s: %w", v.def.Name, err)
	}
	return writeDurably(v.files.record(), append(content, '\n'))
}

// store writes a new guest's folder: it is there with all that belongs to it
// or not at all.
func (v *vm) store() (err error) {
	text, err := v.def.YAML()
	if err != nil {
		return err
	}
	parent := filepath.Dir(v.files.state)
	tmp, err := os.MkdirTemp(parent, temporaryPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if err := writeDurably(filepath.Join(tmp, "definition.yaml"), text); err != nil {
		return err
	}
	if err := writeJSON(filepath.Join(tmp, "record.json"), &v.rec, true); err != nil {
		return err
	}
	if err := os.Rename(tmp, v.files.state); err != nil {
		return err
	}
	return syncDir(parent)
}

// temporaryPrefix begins the name of a folder in the making or being removed.
// No guest can have such a name.
const temporaryPrefix = ".tmp-"

// erase removes all files of the guest, the definition first.
func (v *vm) erase() error {
	parent := filepath.Dir(v.files.state)
	tmp := filepath.Join(parent, temporaryPrefix+v.def.UUID)
	if err := os.Rename(v.files.state, tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := errors.Join(syncDir(parent), os.RemoveAll(tmp), v.cleanRun()); err != nil {
		return err
	}
	v.telling.Lock()
	defer v.telling.Unlock()
	i := v.info()
	i.State = hypervisor.StateRemoved
	v.d.tell(i)
	return nil
}

// cleanRun removes what belonged to the guest's process.
func (v *vm) cleanRun() error {
	return errors.Join(os.RemoveAll(v.files.run), removeIfThere(v.files.memory))
}

// letGo gives up what the driver holds of a running guest; the guest goes on.
func (v *vm) letGo() error {
	err := v.unlearn()
	v.mu.Lock()
	inst := v.inst
	v.inst = nil
	v.mu.Unlock()
	if inst == nil {
		return err
	}
	return errors.Join(err, inst.close())
}
