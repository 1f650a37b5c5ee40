package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// golden compares text with a file. LMCTL_UPDATE=1 writes the file.
func golden(t *testing.T, path, got string) {
	t.Helper()
	if os.Getenv("LMCTL_UPDATE") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\ngot:\n%s\nwant:\n%s", path, got, want)
	}
}

// Every testdata/bad/*.yaml has its error beside it.
func TestBadDefinitions(t *testing.T) {
	paths, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no definitions: %v", err)
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = ParseDefinition(text)
			var bad *DefinitionError
			if !errors.As(err, &bad) || len(bad.Problems) == 0 {
				t.Fatalf("ParseDefinition: %v", err)
			}
			golden(t, strings.TrimSuffix(path, ".yaml")+".error", err.Error()+"\n")
		})
	}
}

// A definition that is stored and read again is the same.
func TestDefinitionRoundTrip(t *testing.T) {
	text, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	def, err := ParseDefinition(text)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := def.YAML()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/full.stored.yaml", string(stored))
	again, err := ParseDefinition(stored)
	if err != nil {
		t.Fatal(err)
	}
	if twice, err := again.YAML(); err != nil || string(twice) != string(stored) {
		t.Errorf("stored twice: %v\n%s", err, twice)
	}
}

// What is left out is filled in once and stays.
func TestDefinitionDefaults(t *testing.T) {
	def, err := ParseDefinition([]byte("name: a\nmemory: 1GiB\nnics: [{bridge: br0}]\ndisks: [{path: /a}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	stored, err := def.YAML()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseDefinition(stored)
	if err != nil {
		t.Fatal(err)
	}
	if def.UUID == "" || again.UUID != def.UUID || again.NICs[0].MAC != def.NICs[0].MAC || !strings.HasPrefix(def.NICs[0].MAC, "52:54:00:") {
		t.Errorf("UUID and MAC changed: %+v, %+v", def, again)
	}
	if def.VCPUs != 1 || def.Machine != "pc" || def.Accelerator != AcceleratorAuto || def.Disks[0].Cache != "none" || int64(def.Memory) != 1<<30 {
		t.Errorf("defaults: %+v", def)
	}
}

func TestArguments(t *testing.T) {
	text, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	def, err := ParseDefinition(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, incoming := range []bool{false, true} {
		l := launch{
			def:      def,
			run:      &runRecord{Machine: "pc-q35-7.2", Accelerator: AcceleratorKVM, CPU: "host", QEMU: "/usr/bin/qemu-system-x86_64"},
			files:    files{state: "/state/guests/with,comma", run: "/run/guests/full", memory: "/dev/shm/lmctl/x.ram"},
			devices:  []bool{false, false, true},
			incoming: incoming,
		}
		args, err := l.arguments()
		if err != nil {
			t.Fatal(err)
		}
		name := map[bool]string{false: "testdata/full.args", true: "testdata/full.incoming.args"}[incoming]
		golden(t, name, strings.Join(args, "\n")+"\n")
	}
}

func FuzzParseDefinition(f *testing.F) {
	for _, pattern := range []string{"testdata/*.yaml", "testdata/bad/*.yaml"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(text)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		def, err := ParseDefinition(text)
		if err != nil {
			if !errors.As(err, new(*DefinitionError)) {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		stored, err := def.YAML()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseDefinition(stored); err != nil {
			t.Fatalf("what was accepted is refused when it is read again: %v\n%s", err, stored)
		}
	})
}

func TestParseMachines(t *testing.T) {
	machines, aliases := parseMachines([]byte("Supported machines are:\nmicrovm              microvm (i386)\npc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)\npc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)\nq35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)\n"))
	if !machines["pc-i440fx-7.2"] || !machines["microvm"] || machines["pc"] || aliases["pc"] != "pc-i440fx-7.2" || aliases["q35"] != "pc-q35-7.2" {
		t.Errorf("%v, %v", machines, aliases)
	}
}

func TestTapName(t *testing.T) {
	a, b := tapName("01234567-89ab-cdef-0123-456789abcdef", 0), tapName("01234567-89ab-cdef-0123-456789abcdef", 1)
	if a == b || len(a) > 15 || a != tapName("01234567-89ab-cdef-0123-456789abcdef", 0) {
		t.Errorf("tap names %q and %q", a, b)
	}
}
