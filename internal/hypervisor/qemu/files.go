package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// files are where the parts of one guest lie on this host.
type files struct {
	state  string // <state>/guests/NAME
	run    string // <run>/guests/NAME
	memory string // <memory>/UUID.ram
}

func (f files) definition() string { return filepath.Join(f.state, "definition.yaml") }
func (f files) record() string     { return filepath.Join(f.state, "record.json") }
func (f files) log() string        { return filepath.Join(f.state, "qemu.log") }
func (f files) consoleLog() string { return filepath.Join(f.state, "console.log") }
func (f files) process() string    { return filepath.Join(f.run, "process.json") }
func (f files) qmp() string        { return filepath.Join(f.run, "qmp.sock") }
func (f files) observer() string   { return filepath.Join(f.run, "observer.sock") }
func (f files) console() string    { return filepath.Join(f.run, "console.sock") }

// suspension is written before a guest's migration settings are touched and
// removed when they are as they were.
func (f files) suspension() string { return filepath.Join(f.run, "suspension.json") }

// resumed is written before the CPUs of a shell are told to run.
func (f files) resumed() string { return filepath.Join(f.run, "resumed") }

// memorySuffix ends the name of every memory file.
const memorySuffix = ".ram"

func (d *Driver) filesOf(name, uuid string) files {
	return files{
		state:  filepath.Join(d.cfg.StateDir, "guests", name),
		run:    filepath.Join(d.cfg.RunDir, "guests", name),
		memory: filepath.Join(d.cfg.MemoryDir, uuid+memorySuffix),
	}
}

// writeDurably replaces a file: after a crash of the host it has the old
// content or the new one.
func writeDurably(path string, content []byte) error {
	return replaceFile(path, content, true)
}

// replaceFile replaces a file: after a crash of this process it has the old
// content or the new one, and after one of the host too if it is durable.
func replaceFile(path string, content []byte, durable bool) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", path, err), removeIfThere(tmp.Name()))
		}
	}()
	_, err = tmp.Write(content)
	if err == nil && durable {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), path); err != nil || !durable {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// readJSON decodes a file of ours. It says fs.ErrNotExist for one that is not
// there.
func readJSON(path string, into any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

func writeJSON(path string, value any, durable bool) error {
	b, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return replaceFile(path, append(b, '\n'), durable)
}
