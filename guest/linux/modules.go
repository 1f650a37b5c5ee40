package linux

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
)

// closure returns the paths of the named modules under dir and of all that they
// need, each after those that it needs. A name that is no module is built into
// the kernel and left out, as long as some name is one.
func closure(dir string, names []string) ([]string, error) {
	paths := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".ko") {
			paths[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("modules: %w", err)
	}
	var order []string
	seen := make(map[string]bool)
	var add func(name string) error
	add = func(name string) error {
		path, ok := paths[name]
		if !ok || seen[name] {
			return nil
		}
		seen[name] = true
		needs, err := depends(path)
		if err != nil {
			return err
		}
		for _, n := range needs {
			if _, ok := paths[n]; !ok {
				return fmt.Errorf("modules: %s needs %s, which is not there", name, n)
			}
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, path)
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	if len(order) == 0 {
		return nil, fmt.Errorf("modules: none of %s under %s", strings.Join(names, ", "), dir)
	}
	return order, nil
}

// moduleName is the kernel's name for the module in a file: it makes no
// difference between - and _.
func moduleName(path string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(path), ".ko"), "-", "_")
}

// depends returns the names of the modules that the one in path needs, as its
// .modinfo section says: strings key=value, each ended by a zero byte.
func depends(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("modules: %s: %w", path, err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("modules: %s: %w", path, errors.New("no .modinfo section"))
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("modules: %s: %w", path, err)
	}
	return parseDependsOn(string(info)), nil
}

func parseDependsOn(info string) []string {
	var names []string
	for entry := range strings.SplitSeq(info, "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok {
			for name := range strings.SplitSeq(list, ",") {
				if name = strings.ReplaceAll(name, "-", "_"); name != "" && !slices.Contains(names, name) {
					names = append(names, name)
				}
			}
		}
	}
	return names
}
