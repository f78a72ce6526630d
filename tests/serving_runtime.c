/* Runs a signature of a SavedModel by TensorFlow's own runtime, without Python: what TensorFlow Serving embeds.
 *
 *     serving_runtime EXPORT {OPERATION:INDEX DTYPE SHAPE FILE}... -- {OPERATION:INDEX FILE}...
 *
 * Inputs stand before the dashes, outputs after them; which operations they are, the SignatureDef says. A DTYPE is a
 * number of TensorFlow's, a SHAPE is like 2,4,32. Files hold plain values; of strings the length (8 bytes), then the
 * bytes. Prints "DTYPE SHAPE" of each output. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

enum { MOST = 8 };

static void fail(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

static void check(TF_Status *status, const char *what) {
  if (TF_GetCode(status) != TF_OK) fail(what, TF_Message(status));
}

static FILE *opened(const char *path, const char *mode) {
  FILE *file = fopen(path, mode);
  if (!file) fail(path, "cannot be opened");
  return file;
}

static void transfer(size_t done, size_t wanted, const char *path) {
  if (done != wanted) fail(path, "has another size");
}

static TF_Output operation(TF_Graph *graph, char *name) {
  char *colon = strrchr(name, ':');
  if (!colon) fail(name, "must be OPERATION:INDEX");
  *colon = 0;
  TF_Output found = {TF_GraphOperationByName(graph, name), atoi(colon + 1)};
  if (!found.oper) fail(name, "no such operation");
  return found;
}

static TF_Tensor *read_tensor(TF_DataType dtype, char *shape, const char *path) {
  int64_t dims[MOST], count = 1;
  int rank = 0;
  for (char *part = strtok(shape, ","); part && rank < MOST; part = strtok(NULL, ",")) {
    dims[rank] = strtoll(part, NULL, 10);
    count *= dims[rank++];
  }
  size_t size = dtype == TF_STRING ? sizeof(TF_TString) : TF_DataTypeSize(dtype);
  TF_Tensor *tensor = TF_AllocateTensor(dtype, dims, rank, count * size);
  FILE *file = opened(path, "rb");
  if (dtype == TF_STRING) {
    TF_TString *strings = TF_TensorData(tensor);
    for (int64_t i = 0; i < count; i++) {
      uint64_t length;
      transfer(fread(&length, sizeof length, 1, file), 1, path);
      char *bytes = malloc(length);
      transfer(fread(bytes, 1, length, file), length, path);
      TF_StringInit(&strings[i]);
      TF_StringCopy(&strings[i], bytes, length);
      free(bytes);
    }
  } else {
    transfer(fread(TF_TensorData(tensor), size, count, file), count, path);
  }
  if (fgetc(file) != EOF) fail(path, "has another size");
  fclose(file);
  return tensor;
}

static void write_tensor(const TF_Tensor *tensor, const char *path) {
  printf("%d ", TF_TensorType(tensor));
  for (int axis = 0; axis < TF_NumDims(tensor); axis++) printf("%s%lld", axis ? "," : "", (long long)TF_Dim(tensor, axis));
  printf("\n");
  FILE *file = opened(path, "wb");
  if (TF_TensorType(tensor) == TF_STRING) {
    const TF_TString *strings = TF_TensorData(tensor);
    for (int64_t i = 0; i < TF_TensorElementCount(tensor); i++) {
      uint64_t length = TF_StringGetSize(&strings[i]);
      transfer(fwrite(&length, sizeof length, 1, file), 1, path);
      transfer(fwrite(TF_StringGetDataPointer(&strings[i]), 1, length, file), length, path);
    }
  } else {
    transfer(fwrite(TF_TensorData(tensor), 1, TF_TensorByteSize(tensor), file), TF_TensorByteSize(tensor), path);
  }
  fclose(file);
}

int main(int argc, char **argv) {
  TF_Status *status = TF_NewStatus();
  TF_Graph *graph = TF_NewGraph();
  TF_SessionOptions *options = TF_NewSessionOptions();
  const char *tag = "serve";
  if (argc < 2) fail(argv[0], "wants an export");
  TF_Session *session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], &tag, 1, graph, NULL, status);
  check(status, argv[1]);

  TF_Output fed[MOST], fetched[MOST];
  TF_Tensor *given[MOST], *made[MOST];
  char *paths[MOST];
  int inputs = 0, outputs = 0, i = 2;
  for (; i + 3 < argc && strcmp(argv[i], "--") && inputs < MOST; i += 4, inputs++) {
    fed[inputs] = operation(graph, argv[i]);
    given[inputs] = read_tensor(atoi(argv[i + 1]), argv[i + 2], argv[i + 3]);
  }
  for (i++; i + 1 < argc && outputs < MOST; i += 2, outputs++) {
    fetched[outputs] = operation(graph, argv[i]);
    paths[outputs] = argv[i + 1];
  }
  TF_SessionRun(session, NULL, fed, given, inputs, fetched, made, outputs, NULL, 0, NULL, status);
  check(status, "TF_SessionRun");
  for (int o = 0; o < outputs; o++) {
    write_tensor(made[o], paths[o]);
    TF_DeleteTensor(made[o]);
  }

  for (int n = 0; n < inputs; n++) TF_DeleteTensor(given[n]);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
