// Kubedecode reads the YAML documents of Kubernetes objects from standard input
// and writes them to standard output as one JSON array.
//
// Kubedecode uses the types of k8s.io/api and refuses unknown and duplicate fields, as
// an API server with strict validation does. When it refuses a document, it writes the
// reason to standard error and its exit status is 1. Tests of vddkcp's examples run it.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kubejson "k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
)

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	text, err := io.ReadAll(in)
	if err != nil {
		return err
	}
	objects, err := decode(string(text))
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(objects)
}

// The function decode decodes the YAML documents in text.
func decode(text string) (objects []runtime.Object, err error) {
	scheme := runtime.NewScheme()
	if err := errors.Join(batchv1.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	decoder := kubejson.NewSerializerWithOptions(kubejson.DefaultMetaFactory, scheme, scheme, kubejson.SerializerOptions{Yaml: true, Strict: true})
	documents := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(text)))
	defer documents.Close()
	document := make([]byte, len(text)+1)
	for {
		n, err := documents.Read(document)
		if err == io.EOF {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		object, _, err := decoder.Decode(document[:n], nil, nil)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", len(objects), err)
		}
		objects = append(objects, object)
	}
}
